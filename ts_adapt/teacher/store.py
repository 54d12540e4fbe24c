"""The teacher's samples on disk.

    shard-00000.safetensors   index (n,), target (n, ...), the condition's tensors (n, ...); optionally
                              trajectory (n, N+1, ...) and trajectory_x0 (n, N, ...)
    manifest.json, shard-00000.json    see `manifest`

Sample i starts from x_T = noise_scale * initial_noise(seed, i), redrawn when it is asked for and never stored. Shard k
holds the samples at the places k S ... (k + 1) S - 1 of the store, with S the shard size; which samples these are says
`indices_of`. Its content is a function of the config alone. A shard counts as finished once the manifest or a receipt
has its checksum: a process killed between the two writes makes that shard again, to the same bytes. Of several
processes (`distributed`) each writes shards; the first one holds the folder and writes the manifest, the others leave
receipts, which it enters there. Everything in the config is hashed; versions are recorded only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ts_adapt import distributed
from ts_adapt.errors import TsAdaptError
from ts_adapt.options import MANY
from ts_adapt.remedies import command
from ts_adapt.sampling import initial_noise
from ts_adapt.storage import files
from ts_adapt.storage.folders import hold, remove_leftovers
from ts_adapt.storage.layout import LOCK, MANIFEST, SHARDS, receipt_file, shard_file, shard_number
from ts_adapt.teacher.manifest import check_config, new_manifest, plain, read_manifest, read_receipts

TRAIN_START = 0
"""First noise index of training and validation."""
TEST_START, TEST_END = 50_000, 50_000 + MANY
"""The noise indices of the test: evaluation draws from these alone, and learning goes on behind them."""

NO_CONDITION = frozenset({"index", "x_T", "target", "trajectory", "trajectory_x0", "prompt_index"})
"""What `load` returns beside the condition's tensors."""


def indices_of(first: int, places: Iterable[int]) -> list[int]:
    """The noise indices of the samples at `places`, from 0 on, of a store that begins with `first`.

    Those of learning leave out the test's: 49,999 is followed by TEST_END.
    """
    free = TEST_START - first if first < TEST_START else math.inf
    return [first + place if place < free else first + place + TEST_END - TEST_START for place in places]


def place_of(first: int, index: int) -> int:
    """The place of a noise index in a store that begins with `first`, negative where it can have none."""
    if first >= TEST_START or index < TEST_START:
        return index - first
    return index - first - (TEST_END - TEST_START) if index >= TEST_END else -1


class TeacherStore:
    """The samples under `folder`. Made by `create` or `open`.

    manifest  what manifest.json holds: `format`, `version`, `hash`, `config`, `versions`, `shards`
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._written: dict[str, Any] = {}
        self._checked: dict[str, tuple[tuple[int, int, str], bool]] = {}

    @classmethod
    def create(cls, folder: str | Path, config: Mapping[str, Any]) -> TeacherStore:
        """Begin a store of `config` (see `CONFIG`; `generate.teacher_config` makes one), or go on with the one there.

        Raises TsAdaptError if a key is missing, if the folder holds samples of another config (naming the key that
        differs), or shards without a manifest, and if another process is beginning one there.
        """
        folder = Path(folder)
        wanted: dict[str, Any] = plain(config)
        check_config(wanted, "the teacher's config")
        store = cls._kept(folder, wanted)
        if store is None:
            with hold(folder / LOCK, f"the teacher folder {folder}"):
                store = cls._kept(folder, wanted) or cls._begun(folder, wanted)
        return store

    @classmethod
    def _kept(cls, folder: Path, config: dict[str, Any]) -> TeacherStore | None:
        """The store that is there, if it is of `config` or cannot be given to it."""
        if not (folder / MANIFEST).exists():
            return None
        store = cls.open(folder)
        if store.config != config and not store.manifest["shards"]:
            return None
        store._refuse_other(config)
        return store

    @classmethod
    def _begun(cls, folder: Path, config: dict[str, Any]) -> TeacherStore:
        if any(folder.glob(SHARDS)):
            raise TsAdaptError(
                f"{folder} holds shards that no manifest.json lists; restore it, or empty the folder and generate again"
            )
        manifest = new_manifest(config)
        files.write_json(folder / MANIFEST, manifest)
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: str | Path, config: Mapping[str, Any] | None = None) -> TeacherStore:
        """Open an existing store; with `config`, only if it was made with that one.

        Raises TsAdaptError if there is none, if its manifest is damaged or altered, or if the config is another.
        """
        folder = Path(folder)
        store = cls(folder, read_manifest(folder))
        if config is not None:
            store._refuse_other(plain(config))
        return store

    @property
    def hash(self) -> str:
        """sha256 of the config, which determines every sample."""
        return str(self.manifest["hash"])

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.manifest["config"])

    @property
    def indices(self) -> list[int]:
        """The indices of all samples in finished, intact shards, rising."""
        return [i for name in self._names() if self._intact(name) for i in self._held(name)]

    def verify(self) -> list[str]:
        """The names of the shards that were finished but are now missing, truncated or altered."""
        return [name for name in self._names() if not self._intact(name)]

    def load(self, indices: Sequence[int] | Tensor, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """The samples of these indices, in their order, on `device` (default: the CPU).

        Returns `index` (n,), `x_T` and `target` (n, ...), the tensors of the condition (n, ...), and `trajectory`
        (n, N+1, ...) with `trajectory_x0` (n, N, ...) where they were kept.

        Raises TsAdaptError naming the index that is not there, or the shard that is damaged; other shards can still be
        loaded.
        """
        wanted = [int(i) for i in indices]
        numbers = [self._shard_with(i) for i in wanted]
        shards = {number: self._read(number) for number in sorted(set(numbers))}
        kinds = [{key: (value.dtype, value.shape[1:]) for key, value in shard.items()} for shard in shards.values()]
        if any(kind != kinds[0] for kind in kinds):
            raise TsAdaptError(
                f"shards in the teacher folder {self.folder} hold tensors of different names, types or shapes; they "
                f"are of several teachers: empty the folder and run {command('teach')} again"
            )
        places = {int(i): row for shard in shards.values() for row, i in enumerate(shard["index"])}
        rows = [(shards[number], places[i]) for number, i in zip(numbers, wanted, strict=True)]
        keys = next(iter(shards.values())).keys() if shards else ("index", "target")
        empty = {"index": torch.empty(0, dtype=torch.int64), "target": torch.empty(0, *self.config["shape"])}
        data = {key: torch.stack([shard[key][row] for shard, row in rows]) if rows else empty[key] for key in keys}
        data["x_T"] = self.starting_noise(wanted)
        return {key: value.to(device) if device is not None else value for key, value in data.items()}

    def starting_noise(self, indices: Sequence[int] | Tensor) -> Tensor:
        """x_T `(n, ...)`, float32, of these indices; they need not be in the store."""
        config = self.manifest["config"]
        return initial_noise(config["seed"], indices, config["shape"]) * float(config["noise_scale"])

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for writing, its manifest read anew; TsAdaptError if another job holds it.

        Of several processes the first one holds it for all.
        """
        with ExitStack() as held:

            def take() -> dict[str, Any]:
                held.enter_context(hold(self.folder / LOCK, f"the teacher folder {self.folder}"))
                remove_leftovers(self.folder)
                manifest = read_manifest(self.folder)
                if manifest["hash"] != self.hash:
                    raise TsAdaptError(f"{self.folder} was given to another config meanwhile; choose another folder")
                return manifest

            self.manifest, self._written = distributed.first(take), {}
            size = self.manifest["config"]["shard_size"]
            self._list(distributed.first(lambda: read_receipts(self.folder, size)))
            yield

    def range_of(self, shard: int, samples: int) -> list[int]:
        """The indices of a shard in a store of `samples` samples."""
        first, size = self.manifest["config"]["first"], self.manifest["config"]["shard_size"]
        return indices_of(first, range(shard * size, min((shard + 1) * size, samples)))

    def shards(self, samples: int) -> range:
        """The numbers of the shards that `samples` samples fill."""
        return range(-(-samples // self.manifest["config"]["shard_size"]))

    def finished(self, shard: int, samples: int) -> bool:
        """Whether a shard is there, intact, and as long as a store of `samples` samples needs it."""
        name = shard_file(shard)
        there = self.manifest["shards"].get(name)
        return there is not None and there["samples"] >= len(self.range_of(shard, samples)) and self._intact(name)

    def write(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished shard: its file first, then its checksum. Inside `writing` only."""
        name = shard_file(shard)
        checksum = files.write_tensors(self.folder / name, tensors)
        kept = {"samples": len(tensors["index"]), "sha256": checksum}
        if distributed.rank() > 0:
            files.write_json((self.folder / receipt_file(name)), kept)
        self._written[name] = kept
        self._list({name: kept})

    def gather(self) -> None:
        """Give every process the list of the shards of all. Inside `writing`, when all of them have written theirs."""
        merged: dict[str, Any] = {}
        for written in distributed.gathered(self._written):
            merged |= written
        self._list(merged)
        distributed.gathered()

    def _list(self, shards: Mapping[str, Any]) -> None:
        """Enter `shards` in the manifest, which the first process writes; their receipts are done with."""
        listed = self.manifest["shards"]
        changed = any(listed.get(name) != kept for name, kept in shards.items())
        self.manifest = self.manifest | {"shards": dict(sorted((listed | dict(shards)).items()))}
        if distributed.rank() == 0:
            if changed:
                files.write_json(self.folder / MANIFEST, self.manifest)
            for name in shards:
                (self.folder / receipt_file(name)).unlink(missing_ok=True)

    def _names(self) -> list[str]:
        return sorted(self.manifest["shards"])

    def _held(self, name: str) -> list[int]:
        config = self.manifest["config"]
        start = shard_number(name) * config["shard_size"]
        return indices_of(config["first"], range(start, start + self.manifest["shards"][name]["samples"]))

    def _shard_with(self, index: int) -> int:
        config = self.manifest["config"]
        number, row = divmod(place_of(config["first"], index), config["shard_size"])
        name = shard_file(number) if number >= 0 else ""
        if name not in self.manifest["shards"] or row >= self.manifest["shards"][name]["samples"]:
            held = sum(shard["samples"] for shard in self.manifest["shards"].values())
            raise TsAdaptError(
                f"sample {index} is not in the teacher folder {self.folder}, which has {held} samples from "
                f"{config['first']} on; generate more of them"
            )
        return int(number)

    def _read(self, number: int) -> dict[str, Tensor]:
        name, config = shard_file(number), self.manifest["config"]
        recorded = self.manifest["shards"][name]
        shapes = {"index": (recorded["samples"],), "target": (recorded["samples"], *config["shape"])}
        try:
            found = files.read_tensors(self.folder / name, shapes, sha256=recorded["sha256"])
            whole = all(value.ndim and len(value) == recorded["samples"] for value in found.values())
            if not whole or found["index"].tolist() != self._held(name):
                raise TsAdaptError(f"{self.folder / name} holds other samples than the manifest says")
            return found
        except TsAdaptError as error:
            raise TsAdaptError(
                f"the teacher's shard {self.folder / name} is missing or damaged (samples {self._held(name)[0]} to "
                f"{self._held(name)[-1]}; the others can be used); run {command('teach')} again to make it anew"
            ) from error

    def _intact(self, name: str) -> bool:
        path, checksum = self.folder / name, self.manifest["shards"][name]["sha256"]
        try:
            stat = path.stat()
        except OSError:
            return False
        state = (stat.st_mtime_ns, stat.st_size, checksum)
        known = self._checked.get(name)
        if known is None or known[0] != state:
            known = self._checked[name] = state, files.sha256_of_file(path) == checksum
        return known[1]

    def _refuse_other(self, config: dict[str, Any]) -> None:
        kept = self.manifest["config"]
        keys = [*kept, *(key for key in config if key not in kept)]
        for key in sorted(keys, key=lambda key: isinstance(kept.get(key), dict)):  # what can be read at a glance first
            if kept.get(key) != config.get(key):
                former, now = (files.shortened(repr(of.get(key)), 60) for of in (kept, config))
                steps, wanted = (len(of["times"]) - 1 for of in (kept, config))
                if key == "times" and steps != wanted:
                    key, former, now = "steps", str(steps), f"{wanted}, which follow from teacher.nfe and test_nfe"
                raise TsAdaptError(
                    f"the teacher folder {self.folder} was made with {key} = {former}, not {now}; set it back "
                    "(as --config the config.yml that `learn` left in its log folder does), remove the folder, or "
                    "choose another one"
                )


def condition_of(data: Mapping[str, Tensor]) -> dict[str, Any]:
    """The condition among the tensors of `TeacherStore.load`, as the denoiser takes it; `a.b` is the entry b of a.

    Raises TsAdaptError where there is an `a` beside an `a.b`.
    """
    condition: dict[str, Any] = {}
    keys = [key for key in data if key not in NO_CONDITION]
    for key in keys:
        if any(key.startswith(f"{other}.") for other in keys):
            raise TsAdaptError(f"the condition has {key!r} and the whole that it is an entry of; generate it again")
        *outer, name = key.split(".")
        place = condition
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = data[key]
    return condition
