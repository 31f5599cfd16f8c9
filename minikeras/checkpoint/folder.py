"""A state whose tensors lie in parts in several processes <-> one folder, that of torch.distributed.checkpoint.

NAME/
    run.pt              all but the tensors in parts; where each part is; a checksum for each other file
    __0_0.distcp, ...   the parts, written by each process
    .metadata           where each part is, for torch's own tools; it is pickled, and never read here

Read by any number of processes: in parts where the model is in parts, else whole. As with a single file, every byte is
checked first, and nothing in a file can run.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from minikeras.atomic import REST, flush, is_folder_of_run
from minikeras.checkpoint.file import dump, read, remedy
from minikeras.checkpoint.plain import like
from minikeras.distributed import World, is_part
from minikeras.errors import CheckpointError

PARTS = "a tensor in parts"  # the key of a dict that stands for one: its name, shape and dtype


def reader(model: nn.Module) -> Callable[[Path], Any]:
    """Reads a file or a folder for that model: in parts where its own parameters are."""
    meshes: Any = (parameter for parameter in model.parameters() if is_part(parameter))
    mesh = next((part.device_mesh for part in meshes), None)
    return lambda path: read_folder(path, mesh) if path.is_dir() else read(path)


# --- written ---


def apart(value: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A nest with a plain dict in place of each tensor in parts; and those, by their place in the nest."""
    if is_part(value):
        return {PARTS: [name, list(value.shape), value.dtype]}, {name: value.detach()}
    if type(value) not in (list, tuple) and not isinstance(value, dict):
        return value, {}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    pairs = {key: apart(item, f"{name}/{key}") for key, item in items}
    rest = ((key, item) for key, (item, _) in pairs.items())
    found = {path: tensor for _, tensors in pairs.values() for path, tensor in tensors.items()}
    return like(value, rest) if isinstance(value, dict) else type(value)(
        item for _, item in rest
    ), found


def save_parts(folder: Path, parts: Mapping[str, Tensor], world: World) -> dict[str, Any]:
    """Write the parts, each process its own, into a new folder; where they are, and checksums. To be called by all.

    Raises:
        OSError: in all processes, where one of them could not.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    problem = ""
    if world.rank == 0:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
    if problem := world.broadcast(problem):
        raise OSError(problem)
    try:
        metadata = save(dict(parts), storage_writer=FileSystemWriter(folder))  # flushes each file
    except CheckpointException as error:
        failed = "; ".join(
            f"process {rank}: {failure[0]}" for rank, failure in error.failures.items()
        )
        raise OSError(failed) from error
    mine = [path for path in folder.iterdir() if path.name.startswith(f"__{world.rank}_")]
    sums = world.gather({path.name: checksum(path) for path in mine}) or []
    files = {name: number for each in sums for name, number in each.items()}
    return {"files": files, "places": places_of(metadata) if world.rank == 0 else None}


def places_of(metadata: Any) -> dict[str, Any]:
    """Where each part of each tensor is, as plain values."""
    chunks = {
        name: [[list(chunk.offsets), list(chunk.sizes)] for chunk in tensor.chunks]
        for name, tensor in metadata.state_dict_metadata.items()
    }
    stored = [
        [
            index.fqn,
            list(index.offset),
            index.index,
            place.relative_path,
            place.offset,
            place.length,
        ]
        for index, place in metadata.storage_data.items()
    ]
    return {"chunks": chunks, "stored": stored}


def checksum(path: Path) -> int:
    """CRC-32, as the zip format of the other files has it."""
    number = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            number = zlib.crc32(piece, number)
    return number


def dump_rest(state: dict[str, Any]) -> Callable[[Path], None]:
    """Writes what is beside the parts into their folder."""

    def save(folder: Path) -> None:
        dump(state)(folder / REST)
        flush(folder / REST)

    return save


# --- read ---


def read_folder(folder: Path, mesh: Any = None) -> Any:
    """The state in a folder, its tensors in parts on the mesh, or whole without one.

    Raises:
        CheckpointError: a file of it is damaged or missing, or it is another folder.
    """
    if not is_folder_of_run(folder):
        hint = remedy(folder)
        if (folder / REST).is_file():
            hint = f"Give the path of the file in it, {folder / REST}."
        raise CheckpointError(f"{folder} is a folder, and not a file or a folder of a run. {hint}")
    try:
        state = read(folder / REST)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is damaged in {REST}. {remedy(folder)}") from error
    parts = state.pop("parts")
    for name, number in parts["files"].items():
        if not (folder / name).is_file() or checksum(folder / name) != number:
            raise CheckpointError(f"{folder} is damaged in {name}. {remedy(folder)}")
    targets: dict[str, Tensor] = {}
    state = with_targets(state, targets, mesh)
    load_parts(folder, targets, parts["places"], mesh)
    return state


def with_targets(value: Any, targets: dict[str, Tensor], mesh: Any) -> Any:
    """A nest with an empty tensor, to be filled, in place of each dict that stands for one."""
    if isinstance(value, dict) and value.keys() == {PARTS}:
        name, shape, dtype = value[PARTS]
        if name not in targets:
            targets[name] = empty(shape, dtype, mesh)
        return targets[name]
    if isinstance(value, dict):
        return like(
            value, ((key, with_targets(item, targets, mesh)) for key, item in value.items())
        )
    if type(value) in (list, tuple):
        return type(value)(with_targets(item, targets, mesh) for item in value)
    return value


def empty(shape: list[int], dtype: torch.dtype, mesh: Any) -> Tensor:
    if mesh is None:
        return torch.empty(shape, dtype=dtype)
    from torch.distributed import tensor

    return tensor.empty(*shape, dtype=dtype, device_mesh=mesh, placements=[tensor.Shard(0)])


def load_parts(folder: Path, targets: dict[str, Tensor], places: dict[str, Any], mesh: Any) -> None:
    """Fill the tensors."""
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        """torch's own takes the places from a pickle."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return metadata_of(places, targets, self.load_id)

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is disabled"
        )  # one process may read it too
        state_dict_loader.load(targets, storage_reader=Reader(folder), no_dist=mesh is None)


def metadata_of(places: dict[str, Any], tensors: Mapping[str, Tensor], load_id: Any) -> Any:
    """The places as torch has them."""
    from torch.distributed.checkpoint import metadata as m

    described: Any = {
        name: m.TensorStorageMetadata(
            m.TensorProperties(tensors[name].dtype),
            tensors[name].shape,
            [
                m.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                for offsets, sizes in chunks
            ],
        )
        for name, chunks in places["chunks"].items()
    }
    stored = {
        m.MetadataIndex(name, torch.Size(offsets), index): SimpleNamespace(
            relative_path=file, offset=offset, length=length, transform_descriptors=None
        )
        for name, offsets, index, file, offset, length in places["stored"]
    }
    return m.Metadata(described, storage_data=stored, storage_meta=m.StorageMeta(load_id=load_id))
