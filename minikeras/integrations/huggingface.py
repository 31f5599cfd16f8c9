"""A model for the Hugging Face Hub, with save_pretrained, from_pretrained and push_to_hub.

save_pretrained    config.json: the constructor's arguments; model.safetensors: Model.save;
                   README.md: a model card
from_pretrained    the constructor with those arguments, then Model.load
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import minikeras
from minikeras.errors import describe

try:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "minikeras.integrations.huggingface needs two packages: "
        "pip install huggingface_hub safetensors"
    ) from error

WEIGHTS = "model.safetensors"  # the name that the Hub uses for weights


class HubModel(minikeras.Model, PyTorchModelHubMixin, library_name="minikeras", tags=["minikeras"]):
    """A `minikeras.Model` with huggingface_hub's save_pretrained, from_pretrained and push_to_hub.

    Subclass it. The arguments of the constructor are saved as JSON, and from_pretrained passes them
    to the constructor again. JSON cannot hold every argument, for example a layer. Such an argument
    is an error if the constructor has a default that would replace it; without a default it is left
    out of the file, and you pass it to from_pretrained.

    Weights are whole, and checked as by `Model.save` and `Model.load`: a file of another
    architecture is an error. With several processes all call save_pretrained, and rank 0 writes.

    Args:
        net: as in `Model`. JSON cannot hold a network, so write a subclass if from_pretrained is to
            build the model.

    Raises:
        CheckpointError: from_pretrained finds weights that are damaged, or of another architecture.
        FileNotFoundError: from_pretrained finds no weights in a folder.
        TypeError: save_pretrained or push_to_hub was called without `config`, for a model with
            arguments that JSON cannot hold.

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

    _coder_types: tuple[type, ...] = ()  # types that a subclass has given `coders` for
    _unsaved_arguments: dict[str, str]  # that config.json would not restore -> what they were

    def __init_subclass__(cls, *args: Any, coders: Any = None, **kwargs: Any) -> None:
        super().__init_subclass__(*args, coders=coders, **kwargs)
        cls._coder_types = tuple(coders or ())

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Give huggingface_hub copies of the arguments, which it keeps.

        The constructor may change a list among the originals.
        """
        copied_args = [_copy_container(value) for value in args]
        copied_kwargs = {name: _copy_container(value) for name, value in kwargs.items()}
        model = super().__new__(cls, *copied_args, **copied_kwargs)
        model._unsaved_arguments = _find_unsaved(cls, args, kwargs)
        return model

    def save_pretrained(self, save_directory: str | Path, **arguments: Any) -> str | None:
        """Write the weights, the constructor's arguments and a model card into a folder.

        Args:
            save_directory: the folder; it is created if needed.
            arguments: `config`, `repo_id`, `push_to_hub`, ... as in huggingface_hub.
        """
        self._check_config(arguments.get("config"))
        if self.is_main_process:
            url: str | None = super().save_pretrained(save_directory, **arguments)
            return url
        self.save(Path(save_directory) / WEIGHTS)  # this process's share of what rank 0 writes
        if arguments.get("push_to_hub"):
            self.push_to_hub("")
        return None

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """Upload the model to a repository on the Hub.

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
        self.save(WEIGHTS)  # this process's share of what rank 0 uploads; it writes no file
        return ""

    def _check_config(self, config: Any) -> None:
        """Refuse to save a model that from_pretrained would silently build differently."""
        if config is None and self._unsaved_arguments:
            name, what = next(iter(self._unsaved_arguments.items()))
            raise TypeError(
                f"{name} was {what}, which config.json cannot hold: from_pretrained would build "
                f"{type(self).__name__} without it. Let the constructor take numbers, strings, "
                f"lists or dicts, under names, and make of them what it needs; or pass config=..., "
                f"a dict for config.json, and to from_pretrained what is not in it."
            )

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights into a folder; called by huggingface_hub."""
        self.save(save_directory / WEIGHTS)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: Any = "cpu", **arguments: Any) -> Any:
        """Build a model with the weights of a folder or of a repository on the Hub.

        Called by huggingface_hub.
        """
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        source = {name: arguments.pop(name) for name in names}
        folder = Path(model_id)
        path: str | Path = folder / WEIGHTS
        if not folder.is_dir():
            path = hf_hub_download(model_id, WEIGHTS, **source)
        elif not (folder / WEIGHTS).exists():
            raise FileNotFoundError(
                f"there is no {WEIGHTS} in {folder}. Pass a folder that save_pretrained wrote."
            )
        model = cls(**arguments)
        model.load(path)
        return model.to(map_location).eval()


def _copy_container(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value


def _find_unsaved(
    cls: type[HubModel], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, str]:
    """Find arguments that JSON cannot restore and that the constructor's defaults would replace.

    Returns their names and what they were.
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    for place, parameter in enumerate(parameters):
        if parameter.kind is parameter.VAR_POSITIONAL and len(args) > place:
            return {f"*{parameter.name}": describe(args[place:])}  # these have no names
    defaults = {parameter.name: parameter.default for parameter in parameters}
    arguments = dict(zip(defaults, args, strict=False)) | kwargs
    unsaved = {}
    for name, value in arguments.items():
        default = defaults.get(name)
        has_other_default = default is not value and default is not inspect.Parameter.empty
        if has_other_default and not _can_be_restored(value, cls._coder_types):
            unsaved[name] = describe(value)
    return unsaved


def _can_be_restored(value: Any, coder_types: tuple[type, ...]) -> bool:
    return isinstance(value, coder_types) or dataclasses.is_dataclass(value) or _is_json(value)


def _is_json(value: Any) -> bool:
    """Tell whether JSON holds a value; a tuple comes back as a list."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (bool, int, float, str))
