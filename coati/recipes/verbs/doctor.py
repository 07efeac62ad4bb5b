"""Look for what would keep a run from starting or going well on this host, or on all of a
hostfile."""

import json
import sys

from coati.cli.this_machine import DoctorSettings, doctor_parser, parse_doctor
from coati.cli.verb import Verb

VERB = Verb("machine", doctor_parser, parse_doctor, "coati.recipes.verbs.doctor:main")


def main(settings: DoctorSettings) -> None:
    """Print what was found, each with its remedy; exit code 1 when something must be mended."""
    from coati.recipes.doctor.diagnosis import Questions, diagnose
    from coati.recipes.doctor.page import as_json, as_text

    found = diagnose(
        Questions(
            settings.launch.hosts,
            save_dir=settings.save_dir,
            port=settings.launch.master_port,
            master_addr=settings.launch.master_addr,
            nproc=settings.launch.nproc or 1,
        )
    )
    print(json.dumps(as_json(found), indent=2) if settings.json else as_text(found))
    if found.to_mend:
        sys.exit(1)
