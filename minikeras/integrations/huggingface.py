"""A model that lives on the Hugging Face Hub: save_pretrained, from_pretrained, push_to_hub.

save_pretrained    config.json: the constructor's arguments; model.safetensors: Model.save; README.md: a model card
from_pretrained    the constructor with those arguments, then Model.load
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import minikeras
from minikeras.errors import described

try:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "minikeras.integrations.huggingface needs two packages: pip install huggingface_hub safetensors"
    ) from error

WEIGHTS = "model.safetensors"  # the Hub's name for them


class HubModel(minikeras.Model, PyTorchModelHubMixin, library_name="minikeras", tags=["minikeras"]):
    """A `minikeras.Model` with huggingface_hub's save_pretrained, from_pretrained and push_to_hub.

    Subclass it; the constructor's arguments are kept as JSON, and are what it is built with again. One that JSON cannot
    hold, as a layer is, is an error where the constructor has a default that would take its place; without a default it
    is left out, and given to from_pretrained anew.
    Weights are whole and checked as by `Model.save` and `Model.load`: a file of another architecture is an error.
    On several processes all call save_pretrained, and rank 0 writes.

    Args:
        net: as in `Model`; JSON cannot hold one, so what from_pretrained is to build again is a subclass.

    Raises:
        CheckpointError: from_pretrained finds weights that are damaged, or of another architecture.
        FileNotFoundError: from_pretrained finds no weights in a folder.
        TypeError: save_pretrained or push_to_hub, without `config`, of a model with arguments that JSON cannot hold.

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

    _coded: tuple[type, ...] = ()  # types that a subclass has given `coders` for
    _lost: dict[str, str]  # arguments that config.json would not bring back -> what they were

    def __init_subclass__(cls, *args: Any, coders: Any = None, **kwargs: Any) -> None:
        super().__init_subclass__(*args, coders=coders, **kwargs)
        cls._coded = tuple(coders or ())

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """huggingface_hub keeps the arguments here, before the constructor may change a list among them."""
        model = super().__new__(
            cls, *map(_as_given, args), **{name: _as_given(it) for name, it in kwargs.items()}
        )
        model._lost = _not_kept(cls, args, kwargs)
        return model

    def save_pretrained(self, save_directory: str | Path, **arguments: Any) -> str | None:
        """Write weights, arguments and a model card into a folder; huggingface_hub's arguments.

        Args:
            save_directory: the folder, made where it is not there.
            arguments: `config`, `repo_id`, `push_to_hub`, ... as in huggingface_hub.
        """
        self._check_config(arguments.get("config"))
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
        self._check_config(arguments.get("config"))
        if self.is_main_process:
            url: str = super().push_to_hub(repo_id, **arguments)
            return url
        self.save(WEIGHTS)  # its share of what rank 0 uploads; this writes nothing
        return ""

    def _check_config(self, config: Any) -> None:
        """from_pretrained must not build another model, without a word."""
        if config is None and self._lost:
            name, what = next(iter(self._lost.items()))
            raise TypeError(
                f"{name} was {what}, which config.json cannot hold: from_pretrained would build {type(self).__name__} "
                f"without it. Let the constructor take numbers, strings, lists or dicts, under names, and make of them "
                f"what it needs; or pass config=..., a dict for config.json, and to from_pretrained what is not in it."
            )

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
            raise FileNotFoundError(
                f"there is no {WEIGHTS} in {folder}. Pass a folder that save_pretrained wrote."
            )
        path = folder / WEIGHTS if folder.is_dir() else hf_hub_download(model_id, WEIGHTS, **source)
        model = cls(**arguments)
        model.load(path)
        return model.to(map_location).eval()


def _as_given(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value


def _not_kept(cls: type[HubModel], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
    """Arguments that JSON does not bring back, and without which the constructor would take a default."""
    parameters = {
        one.name: one for one in list(inspect.signature(cls.__init__).parameters.values())[1:]
    }
    given = dict(zip(parameters, args, strict=False)) | kwargs
    for place, (name, one) in enumerate(parameters.items()):
        if one.kind is one.VAR_POSITIONAL and len(args) > place:
            return {f"*{name}": described(args[place:])}  # they have no names
    defaults = {name: one.default for name, one in parameters.items()}

    def lost(name: str, value: Any) -> bool:
        default = defaults.get(name)
        return (
            not _comes_back(value, cls._coded)
            and default is not value
            and default is not inspect.Parameter.empty
        )

    return {name: described(value) for name, value in given.items() if lost(name, value)}


def _comes_back(value: Any, coded: tuple[type, ...]) -> bool:
    return isinstance(value, coded) or dataclasses.is_dataclass(value) or _is_json(value)


def _is_json(value: Any) -> bool:
    """Whether JSON holds a value; a tuple comes back as a list."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (bool, int, float, str))
