"""The short look before several processes are started: silent when all is well."""

from coati.cli.settings import TrainingSettings
from coati.recipes.doctor.diagnosis import Questions, diagnose
from coati.utils.errors import RunFailed
from coati.utils.logging import get_logger

logger = get_logger(__name__)


def preflight(settings: TrainingSettings) -> None:
    """Look at every host of the run, in a second or two.

    Raises RunFailed with all that would keep it from running; warns of what may.
    """
    launch = settings.launch
    found = diagnose(
        Questions(
            launch.hosts,
            save_dir=settings.output.save_dir,
            port=launch.master_port,
            master_addr=launch.master_addr,
            nproc=launch.nproc or 1,
            short=True,
        )
    )
    for finding in found.to_note:
        logger.warning(finding.text)
    if found.to_mend:
        several = " ".join(finding.text + "." for finding in found.to_mend)
        raise RunFailed(
            f"{several} `coati doctor` looks closer, --no_preflight starts without this look"
        )
