"""Online DPO: the same as ``coati online-dpo``."""

from coati.legacy.flags import SHARED
from coati.recipes.command import run

if __name__ == "__main__":
    run("online-dpo", older=SHARED)
