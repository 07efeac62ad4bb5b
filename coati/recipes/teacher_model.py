"""The teacher of a run: a model of the student's tokenizer, frozen, or a server."""

from typing import Any

from coati.cli.distilling import GKDSettings
from coati.dataset.load.loader import row_lengths
from coati.models.generation.end_tokens import stop_sequences
from coati.models.loading import DTYPES, base_below, find_model, load_causal_lm, load_config
from coati.models.positions import check_tokens, positions_in, within_positions
from coati.models.tokenizer import PROBE, find_tokenizer, load_tokenizer
from coati.parallel.engine import Engine
from coati.parallel.families import check_family
from coati.parallel.options import ParallelOptions
from coati.parallel.plugin_checks import check_heads
from coati.parallel.plugins import PLUGINS
from coati.parallel.sharded_generation import cannot_sample
from coati.recipes import build
from coati.recipes.offline import TrainingData
from coati.recipes.run import Run
from coati.trainer.on_policy_rows import OnPolicySettings
from coati.trainer.teachers import ModelTeacher, ServerTeacher, Teacher
from coati.utils.distributed import raise_together
from coati.utils.phases import phase


def teacher_options(options: ParallelOptions) -> ParallelOptions:
    """How the teacher lies beside a student of ``options`` (resolved): split over the same
    processes by ``--tp`` of plugin 3d, else whole in each."""
    if options.tp > 1 and PLUGINS[options.plugin].hybrid:
        return options
    return ParallelOptions(plugin="ddp", precision=options.precision)


def teacher(run: Run[GKDSettings], rows: TrainingData) -> Teacher:
    """The teacher of ``--teacher`` or ``--teacher_url``.

    Raises ValueError for another tokenizer than the student's, before weights are loaded, and for
    rows that are longer than what it has positions for.
    """
    asked = run.settings.teaching
    if asked.teacher_url is not None:
        assert asked.teacher_top_k is not None
        server = ServerTeacher(asked.teacher_url, asked.teacher_top_k, asked.teacher_served_name)
        with phase("asking the teacher's server"):
            raise_together(lambda: server.check(run.tokenizer))
        return server
    assert asked.teacher is not None
    path = find_model(asked.teacher, "actor")
    trust = run.settings.model.trust_remote_code
    options = teacher_options(run.options)
    _check_tokenizer(run.tokenizer, path, trust)
    longest = _longest_row(run, rows)
    what = f"--teacher {asked.teacher}: the longest row of --dataset"
    check_tokens(positions_in(path, trust), longest, what, "lower --max_length")
    config = load_config(base_below(path), trust_remote_code=trust)
    check_heads(config, options)
    check_family(config, options)
    loading: dict[str, Any] = {
        "dtype": options.precision if options.precision in DTYPES else "auto",
        "attn_implementation": build.attention(run),
        "trust_remote_code": trust,
    }
    return ModelTeacher(build.frozen(options, lambda: load_causal_lm(path, **loading)))


def _longest_row(run: Run[GKDSettings], rows: TrainingData) -> int:
    """Tokens of the longest row to train or evaluate on; of a stream the longest allowed."""
    most = run.settings.data.max_length
    if rows.stream is not None:
        return most
    sets = [rows.train.rows, *([rows.evaluation.rows] if rows.evaluation else [])]
    return min(most, max(int(row_lengths(each).max()) for each in sets if len(each)))


def _check_tokenizer(ours: Any, path: str, trust: bool) -> None:
    """Raise ValueError where a token of the student is another one of the teacher's, or text is
    split otherwise: probabilities are compared token by token."""
    theirs = load_tokenizer(find_tokenizer(path), trust_remote_code=trust)
    known = theirs.get_vocab()
    remedy = (
        "distillation compares probabilities token by token, so take a teacher of the student's "
        "tokenizer"
    )
    for token, id in sorted(ours.get_vocab().items(), key=lambda pair: pair[1]):
        if known.get(token) != id:
            there = "is none" if token not in known else f"has the id {known[token]}"
            raise ValueError(
                f"--teacher {path} has another tokenizer: the student's token {token!r} of id {id} "
                f"{there} there ({len(ours)} and {len(theirs)} tokens); {remedy}"
            )
    probes = [each.encode(PROBE, add_special_tokens=False) for each in (ours, theirs)]
    if probes[0] != probes[1]:
        raise ValueError(
            f"--teacher {path} has another tokenizer: the same tokens, but {PROBE!r} is "
            f"{len(probes[0])} of them for the student and {len(probes[1])} for the teacher; "
            f"{remedy}"
        )


def on_policy(run: Run[GKDSettings], engine: Engine, taught_by: Teacher) -> OnPolicySettings | None:
    """How the student answers rows itself, within what it and the teacher have positions for; None
    with ``--gkd_lambda 0``. Raises ValueError for a model that cannot be sampled from."""
    asked = run.settings.sampling
    if not asked.gkd_lambda:
        return None
    if reason := cannot_sample(engine):
        raise ValueError(f"{reason}; or answer no row: --gkd_lambda 0")
    stop_ids = [] if run.template is None else run.template.stop_ids
    pad = run.tokenizer.pad_token_id
    longest = within_positions(engine.module.config, run.settings.data.max_length)
    if isinstance(taught_by, ModelTeacher):
        longest = within_positions(taught_by.model.engine.module.config, longest)
    return OnPolicySettings(
        share=asked.gkd_lambda,
        stop_sequences=stop_sequences(stop_ids, run.tokenizer, engine.model),
        pad_token_id=0 if pad is None else pad,
        max_new_tokens=asked.max_new_tokens,
        max_length=longest,
        seed=run.settings.seed,
        temperature=asked.temperature,
        batch_size=asked.inference_batch_size,
    )
