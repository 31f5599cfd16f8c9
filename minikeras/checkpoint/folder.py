"""Write a state with sharded tensors to one folder of torch.distributed.checkpoint, and read it.

NAME/
    run.pt              all but the sharded tensors; where each shard is; a checksum for each other
                        file
    __0_0.distcp, ...   the shards, written by each process
    .metadata           where each shard is, for torch's own tools; it is pickled and never read
                        here

Any number of processes can read it: sharded if the model is sharded, else whole. As with a single
file, every byte is checked first, and nothing in a file can run.
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

from minikeras.checkpoint.file import dump, read, remedy
from minikeras.checkpoint.plain import like
from minikeras.errors import CheckpointError
from minikeras.nests import is_sharded
from minikeras.processes import OneProcess
from minikeras.support.atomic import REST, flush, is_folder_of_run

# The key of a dict that stands for a sharded tensor: its name, shape and dtype.
PARTS = "a tensor in parts"


def reader(model: nn.Module) -> Callable[[Path], Any]:
    """Return a function that reads a file or a folder for a model, sharded if the model is."""
    mesh: Any = None
    for parameter in model.parameters():
        if is_sharded(parameter):
            sharded: Any = parameter
            mesh = sharded.device_mesh
            break

    def read_path(path: Path) -> Any:
        if path.is_dir():
            return read_folder(path, mesh)
        return read(path)

    return read_path


# --- writing ---


def apart(value: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Take the sharded tensors out of a nest.

    Returns:
        The nest with a plain dict in place of each, and the tensors by their place in the nest.
    """
    if is_sharded(value):
        return {PARTS: [name, list(value.shape), value.dtype]}, {name: value.detach()}
    if type(value) not in (list, tuple) and not isinstance(value, dict):
        return value, {}
    rest: dict[Any, Any] = {}
    tensors: dict[str, Tensor] = {}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        rest[key], tensors_of_item = apart(item, f"{name}/{key}")
        tensors.update(tensors_of_item)
    if isinstance(value, dict):
        return like(value, rest.items()), tensors
    return type(value)(rest.values()), tensors


def save_parts(folder: Path, parts: Mapping[str, Tensor], world: OneProcess) -> dict[str, Any]:
    """Write the shards into a new folder, each process its own; all processes call it.

    Returns:
        A checksum for each file, and, on rank 0, where each shard is.

    Raises:
        OSError: in all processes, if one of them could not write.
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
    problem = world.broadcast(problem)
    if problem:
        raise OSError(problem)
    try:
        metadata = save(dict(parts), storage_writer=FileSystemWriter(folder))  # flushes each file
    except CheckpointException as error:
        failures = []
        for rank, failure in error.failures.items():
            failures.append(f"process {rank}: {failure[0]}")
        raise OSError("; ".join(failures)) from error
    own_checksums = {}
    for path in folder.iterdir():
        if path.name.startswith(f"__{world.rank}_"):
            own_checksums[path.name] = checksum(path)
    files: dict[str, int] = {}
    for checksums in world.gather(own_checksums) or []:
        files.update(checksums)
    places = None
    if world.rank == 0:
        places = to_plain_places(metadata)
    return {"files": files, "places": places}


def to_plain_places(metadata: Any) -> dict[str, Any]:
    """Convert torch's metadata, which says where each shard of each tensor is, to plain values."""
    chunks = {}
    for name, tensor in metadata.state_dict_metadata.items():
        chunks[name] = [[list(chunk.offsets), list(chunk.sizes)] for chunk in tensor.chunks]
    stored = []
    for index, place in metadata.storage_data.items():
        offset = list(index.offset)
        bytes_of_file = [place.relative_path, place.offset, place.length]
        stored.append([index.fqn, offset, index.index, *bytes_of_file])
    return {"chunks": chunks, "stored": stored}


def checksum(path: Path) -> int:
    """Compute the CRC-32 of a file, as the zip format has it for the other files."""
    number = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            number = zlib.crc32(piece, number)
    return number


def dump_rest(state: dict[str, Any]) -> Callable[[Path], None]:
    """Return a function that writes all but the shards into their folder."""

    def save(folder: Path) -> None:
        dump(state)(folder / REST)
        flush(folder / REST)

    return save


# --- reading ---


def read_folder(folder: Path, mesh: Any = None) -> Any:
    """Read the state in a folder, its tensors sharded over the mesh, or whole without a mesh.

    Raises:
        CheckpointError: a file in it is damaged or missing, or it is no folder of a run.
    """
    if not is_folder_of_run(folder):
        hint = remedy(folder)
        if (folder / REST).is_file():
            hint = f"Pass the path of the file in it, {folder / REST}."
        raise CheckpointError(f"{folder} is a folder, but not one with a checkpoint. {hint}")
    try:
        state = read(folder / REST)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is damaged in {REST}. {remedy(folder)}") from error
    parts = state.pop("parts")
    for name, number in parts["files"].items():
        if not (folder / name).is_file() or checksum(folder / name) != number:
            raise CheckpointError(f"{folder} is damaged in {name}. {remedy(folder)}")
    targets: dict[str, Tensor] = {}
    state = create_targets(state, targets, mesh)
    load_parts(folder, targets, parts["places"], mesh)
    return state


def create_targets(value: Any, targets: dict[str, Tensor], mesh: Any) -> Any:
    """Replace each dict that stands for a tensor by an empty tensor, and add it to `targets`."""
    if isinstance(value, dict) and value.keys() == {PARTS}:
        name, shape, dtype = value[PARTS]
        if name not in targets:
            targets[name] = create_empty(shape, dtype, mesh)
        return targets[name]
    if isinstance(value, dict):
        filled = {}
        for key, item in value.items():
            filled[key] = create_targets(item, targets, mesh)
        return like(value, filled.items())
    if type(value) in (list, tuple):
        return type(value)(create_targets(item, targets, mesh) for item in value)
    return value


def create_empty(shape: list[int], dtype: torch.dtype, mesh: Any) -> Tensor:
    """Create an uninitialized tensor, sharded over the mesh if there is one."""
    if mesh is None:
        return torch.empty(shape, dtype=dtype)
    from torch.distributed import tensor

    return tensor.empty(*shape, dtype=dtype, device_mesh=mesh, placements=[tensor.Shard(0)])


def load_parts(folder: Path, targets: dict[str, Tensor], places: dict[str, Any], mesh: Any) -> None:
    """Fill the tensors with the values in the folder."""
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        """A reader without the pickled metadata that torch's own reader loads."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return to_torch_metadata(places, targets, self.load_id)

    with warnings.catch_warnings():
        # A single process may read it too.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_loader.load(targets, storage_reader=Reader(folder), no_dist=mesh is None)


def to_torch_metadata(places: dict[str, Any], tensors: Mapping[str, Tensor], load_id: Any) -> Any:
    """Convert plain places back to torch's metadata."""
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensor_metadata: Any = {}
    for name, plain_chunks in places["chunks"].items():
        chunks = []
        for offsets, sizes in plain_chunks:
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        tensor = tensors[name]
        properties = TensorProperties(tensor.dtype)
        tensor_metadata[name] = TensorStorageMetadata(properties, tensor.shape, chunks)
    stored = {}
    for name, offsets, index, file, offset, length in places["stored"]:
        place = SimpleNamespace(
            relative_path=file, offset=offset, length=length, transform_descriptors=None
        )
        stored[MetadataIndex(name, torch.Size(offsets), index)] = place
    return Metadata(tensor_metadata, storage_data=stored, storage_meta=StorageMeta(load_id=load_id))
