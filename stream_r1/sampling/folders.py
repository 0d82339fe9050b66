"""Where a pipeline's parts are: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stream_r1.models.wan import unsupported_part
from stream_r1.places import BROUGHT, locate


@dataclass(frozen=True)
class Parts:
    """A folder with models of one of two layouts.

    `small`: this project's assets, `student/ vae/` with prompts through MiniLM; else diffusers',
    `transformer/ vae/ text_encoder/ tokenizer/`.
    """

    folder: Path
    small: bool

    @property
    def student(self) -> Path:
        return self.folder / ("student" if self.small else "transformer")

    @property
    def vae(self) -> Path:
        return self.folder / "vae"


def find_parts(folder_or_repo: str | Path, checkpoint: str | Path | None, *, with_text: bool) -> Parts:
    """The parts of a folder or repository, complete, before anything is loaded.

    Args:
        folder_or_repo: a local folder, or `owner/name` on the hub, of which the parts are downloaded once.
        checkpoint: the student's weights where they are not the folder's.
        with_text: whether the folder's text encoder is needed.

    Raises:
        FileNotFoundError: what is missing, all of it.
        NotImplementedError: a Wan model with parts that are not supported.
    """
    folder = _local_folder(folder_or_repo, with_student=checkpoint is None, with_text=with_text)
    parts = Parts(folder, small=(folder / "student").is_dir() and not (folder / "transformer").is_dir())
    problem = unsupported_part(folder)
    if problem is not None:
        raise NotImplementedError(f"from_pretrained: {folder} {problem}")
    needed = ["vae/config.json"]
    if checkpoint is None:
        needed.append(f"{parts.student.name}/config.json")
    elif not Path(checkpoint).exists():
        raise FileNotFoundError(f"from_pretrained: no such checkpoint: {checkpoint}")
    if with_text and not parts.small:
        needed += ["text_encoder/config.json", "tokenizer"]
    missing = [part for part in needed if not (folder / part).exists()]
    if missing:
        raise FileNotFoundError(f"from_pretrained: {folder} lacks {', '.join(missing)}")
    return parts


def _local_folder(folder_or_repo: str | Path, *, with_student: bool, with_text: bool) -> Path:
    folder = locate(folder_or_repo)
    if folder.is_dir():
        return folder
    name = str(folder_or_repo)
    if name.count("/") != 1 or name.startswith((".", "/", "~", *BROUGHT)):
        raise FileNotFoundError(f"from_pretrained: no such folder: {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["vae/*", "transformer/config.json", "model_index.json"]
    wanted += ["transformer/*"] * with_student + ["text_encoder/*", "tokenizer/*"] * with_text
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        expected = "a local folder or a repository of the hub that can be reached"
        raise FileNotFoundError(f"from_pretrained: expected {expected}, got {name}: {error}") from error
