"""What mkdocs.yml asks of a page beyond Markdown.

Links from docs/ to files outside it (``../examples/...``) work on a code host, where the whole
repository is. On the site they lead to ``repo_url``; where that is empty they stay as text, with
the path behind it. Every page is also copied as Markdown, beside its HTML, for llms.txt.
"""

import posixpath
import re
import shutil
from pathlib import Path

_FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s#]*)(#[^)\s]*)?\)")


def outside_links(markdown: str, source: str, repo_url: str) -> str:
    """``markdown`` of the page ``source`` (its path below docs/) with its links to files outside
    docs/ pointing into ``repo_url``, or turned into text where that is empty. Links inside docs/
    and code blocks stay as they are."""

    def replaced(found: re.Match) -> str:
        text, target, anchor = found.groups(default="")
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), target))
        if path.startswith("docs/"):
            return found.group(0)
        if repo_url:
            return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    parts = _FENCE.split(markdown)  # prose and code blocks by turns
    parts[::2] = [_LINK.sub(replaced, prose) for prose in parts[::2]]
    return "".join(parts)


def on_page_markdown(markdown: str, page, config, files) -> str:
    return outside_links(markdown, page.file.src_uri, config["repo_url"] or "")


def on_post_build(config) -> None:
    docs = Path(config["docs_dir"])
    for page in docs.rglob("*.md"):
        goal = Path(config["site_dir"]) / page.relative_to(docs)
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, goal)
