"""What the wheel and the sdist hold. The only place that says what coati needs: dependencies come
from requirements.txt, widened to the releases that are tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# What the tests pass with; requirements.txt names one release of each.
SUPPORTED = {"torch": ">=2.11,<2.15", "transformers": ">=5.17,<5.25", "peft": ">=0.21,<0.22"}
CLEANING = ["datasketch>=2.0"]
EVAL = ["lm-eval>=0.4.9"]
# Triton kernels, which run on NVIDIA GPUs alone.
LIGER = ["liger-kernel>=0.6"]
# llmcompressor itself is installed with --no-deps: each of its releases asks for an older torch and
# transformers, and runs with these.
QUANTIZE = ["bitsandbytes>=0.50", "compressed-tensors==0.19.0", "loguru", "nvidia-ml-py"]
# One minor release: both sides of a cluster must have the same, and its errors are read.
RAY = ["ray>=2.60,<2.61"]
SERVE = ["fastapi>=0.132", "prometheus-client>=0.20", "uvicorn>=0.29"]
# There is no extra for flash-attn, which is built from source against an installed torch, and not
# in the isolated environment where pip builds what an extra names.
DEV = [
    "hypothesis>=6.100",
    "jsonschema>=4.18",
    "mypy>=1.13",
    "pytest>=8",
    "ruff>=0.6",
    # what the tests call the server with; the browser itself (chromium) comes from the system
    "httpx>=0.27",
    "openai>=1.50",
    "schemathesis>=4",
    "playwright>=1.45",
    "ipykernel>=6",
    "nbclient>=0.8",
    # what builds the wheel and the sdist, in the tests without a network
    "build>=1.2",
    "setuptools>=77",
    # the website, as in docs/requirements.txt
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.7,<10",
    "mkdocstrings[python]>=1,<2",
    *CLEANING,
    *QUANTIZE,
    *RAY,
    *SERVE,
]
# Folders of the checkout that users name files of; coati/utils/resources.py finds them in either.
SHIPPED = ("config", "config/conversation_template", "examples/recipes")


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


def shipped() -> dict[str, str]:
    """The folders of SHIPPED by the package that holds them in the wheel."""
    there = [folder for folder in SHIPPED if (HERE / folder).is_dir()]
    return {f"coati.{folder.replace('/', '.')}": folder for folder in there}


setup(
    name="coati",
    version=version(),
    description="Supervised fine-tuning and alignment of chat models on ColossalAI",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The coati authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["RLHF", "SFT", "DPO", "PPO", "GRPO", "reward model", "LLM", "ColossalAI"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=[*find_packages(include=["coati", "coati.*"]), *shipped()],
    package_dir=shipped(),
    package_data={
        "": ["*.jinja", "*.html"],
        "coati.inference.serve": ["vendor/*"],
        "coati.cli": ["schemas/*.json"],
        "coati.parallel.footprint": ["shapes/*.json"],
        "coati.config": ["lora_config.json", "hostfile.example"],
        "coati.config.conversation_template": ["*.json"],
        "coati.examples.recipes": ["**/*.yaml", "**/*.md"],
    },
    entry_points={"console_scripts": ["coati = coati.__main__:main"]},
    python_requires=">=3.11,<3.15",
    install_requires=requirements(),
    extras_require={
        "cleaning": CLEANING,
        "dev": DEV,
        "eval": EVAL,
        "liger": LIGER,
        "quantize": QUANTIZE,
        "ray": RAY,
        "serve": SERVE,
    },
)
