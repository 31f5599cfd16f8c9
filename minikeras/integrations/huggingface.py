"""A model that lives on the Hugging Face Hub: save_pretrained, from_pretrained, push_to_hub.

save_pretrained    config.json: the constructor's arguments; model.safetensors: Model.save; README.md: a model card
from_pretrained    the constructor with those arguments, then Model.load
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import minikeras

try:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'minikeras.integrations.huggingface needs two packages: pip install "minikeras[huggingface]"'
    ) from error

WEIGHTS = "model.safetensors"  # the Hub's name for them


class HubModel(minikeras.Model, PyTorchModelHubMixin, library_name="minikeras", tags=["minikeras"]):
    """A `minikeras.Model` with huggingface_hub's save_pretrained, from_pretrained and push_to_hub.

    Subclass it; the constructor's arguments are kept where JSON can hold them, and are what it is built with again.
    Weights are whole and checked as by `Model.save` and `Model.load`: a file of another architecture is an error.
    On several processes all call save_pretrained, and rank 0 writes.

    Args:
        net: as in `Model`; JSON cannot hold one, so what from_pretrained is to build again is a subclass.

    Raises:
        CheckpointError: from_pretrained finds weights that are damaged, or of another architecture.
        FileNotFoundError: from_pretrained finds no weights in a folder.

    >>> import tempfile
    >>> import torch
    >>> from torch import nn
    >>> from minikeras.integrations.huggingface import HubModel
    >>> class Net(HubModel):
    ...     def __init__(self, hidden=8):
    ...         super().__init__()
    ...         self.layers = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    ...     def forward(self, x):
    ...         return self.layers(x)
    >>> model, folder = Net(hidden=32), tempfile.mkdtemp()
    >>> model.save_pretrained(folder)
    >>> twin = Net.from_pretrained(folder)
    >>> torch.equal(twin.predict(torch.ones(3, 2)), model.predict(torch.ones(3, 2)))
    True
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """huggingface_hub keeps the arguments here, before the constructor may change a list among them."""
        return super().__new__(cls, *map(_as_given, args), **{name: _as_given(it) for name, it in kwargs.items()})

    def save_pretrained(self, save_directory: str | Path, **arguments: Any) -> str | None:
        """Write weights, arguments and a model card into a folder; huggingface_hub's arguments.

        Args:
            save_directory: the folder, made where it is not there.
            arguments: `config`, `repo_id`, `push_to_hub`, ... as in huggingface_hub.
        """
        if self.is_main_process:
            url: str | None = super().save_pretrained(save_directory, **arguments)
            return url
        self.save(Path(save_directory) / WEIGHTS)  # its share of what rank 0 writes
        if arguments.get("push_to_hub"):
            self.push_to_hub("")
        return None

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """Upload to a repository on the Hub.

        Args:
            repo_id: "user/name".
            arguments: `commit_message`, `private`, `token`, ... as in huggingface_hub.

        Returns:
            the address of the commit; "" on a process other than rank 0, which uploads.
        """
        if self.is_main_process:
            url: str = super().push_to_hub(repo_id, **arguments)
            return url
        self.save(WEIGHTS)  # its share of what rank 0 uploads; this writes nothing
        return ""

    def _save_pretrained(self, save_directory: Path) -> None:
        """huggingface_hub's place for it: the weights into a folder."""
        self.save(save_directory / WEIGHTS)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: Any = "cpu", **arguments: Any) -> Any:
        """huggingface_hub's place for it: a new model with the weights of a folder, or of a repository on the Hub."""
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        source = {name: arguments.pop(name) for name in names}
        folder = Path(model_id)
        if folder.is_dir() and not (folder / WEIGHTS).exists():
            raise FileNotFoundError(f"there is no {WEIGHTS} in {folder}. Pass a folder that save_pretrained wrote.")
        path = folder / WEIGHTS if folder.is_dir() else hf_hub_download(model_id, WEIGHTS, **source)
        model = cls(**arguments)
        model.load(path)
        return model.to(map_location).eval()


def _as_given(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value
