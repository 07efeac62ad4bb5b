import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# llmcompressor itself is installed with --no-deps: each of its releases asks for an older torch and
# transformers, and runs with these.
QUANTIZE = ["bitsandbytes>=0.46", "compressed-tensors==0.19.0", "loguru", "nvidia-ml-py"]
# What the tests pass with; requirements.txt names one release of each.
SUPPORTED = {"torch": ">=2.11,<2.15", "transformers": ">=5.17,<5.25", "peft": ">=0.21,<0.22"}


def requirements() -> list[str]:
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    names = [re.match(r"[\w-]+", line)[0] for line in wanted]
    return [
        name + SUPPORTED[name] if name in SUPPORTED else line
        for name, line in zip(names, wanted, strict=True)
    ]


def version() -> str:
    return re.search(
        r'__version__ = "(.+?)"', (HERE / "coati" / "__init__.py").read_text(encoding="utf-8")
    )[1]


setup(
    name="coati",
    version=version(),
    description="Supervised fine-tuning and alignment of chat models on ColossalAI",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["coati", "coati.*"]),
    package_data={"coati.dataset.report": ["*.jinja"], "coati.inference.serve": ["*.html"]},
    python_requires=">=3.11,<3.15",
    install_requires=requirements(),
    extras_require={
        "cleaning": ["datasketch>=2.0"],
        "dev": [
            "datasketch>=2.0",
            "hypothesis>=6.100",
            "mypy>=1.13",
            "pytest>=8",
            "ruff>=0.6",
            # the server, and what its tests call it with; the browser itself (chromium) comes from
            # the system
            "fastapi>=0.132",
            "prometheus-client>=0.20",
            "uvicorn>=0.29",
            "httpx>=0.27",
            "openai>=1.50",
            "schemathesis>=4",
            "playwright>=1.45",
            *QUANTIZE,
            "ipykernel>=6",
            "nbclient>=0.8",
        ],
        "flash": ["flash-attn>=2.5"],
        "quantize": QUANTIZE,
        "serve": ["fastapi>=0.132", "prometheus-client>=0.20", "uvicorn>=0.29"],
    },
)
