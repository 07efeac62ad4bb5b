"""What coati sft and coati pretrain learn of a token: the loss, and NEFTune's noise."""

from coati.cli.settings import SFTSettings
from coati.models.embedding_noise import EmbeddingNoise
from coati.models.loss_registry import NLL
from coati.parallel.engine import Engine
from coati.recipes.extras import Extras
from coati.recipes.run import Run
from coati.trainer.sft import TokenLoss


def chosen(settings: SFTSettings, extras: Extras) -> TokenLoss | str:
    """The caller's own loss, or the name of ``--sft_loss``. Raises ValueError for both."""
    name = settings.loss.sft_loss
    if extras.loss is None:
        return name
    if name != NLL:
        raise ValueError(f"--sft_loss {name} and a loss function of your own: give one of them")
    return extras.loss


def add_noise(run: Run[SFTSettings], engine: Engine) -> None:
    """The noise of ``--neftune_alpha`` on the embeddings of ``engine``'s model, in training."""
    alpha = run.settings.loss.neftune_alpha
    if alpha is not None:
        schedule = engine.lr_scheduler
        engine.share_prefixes = False  # the noise of a token depends on the whole of its row
        EmbeddingNoise(engine.module, alpha, run.settings.seed, lambda: schedule.last_epoch)
