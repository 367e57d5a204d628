"""A preference vector: the difference of two policies, its arithmetic, and what it can be turned into."""

import copy
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from steerkit import storage
from steerkit.activations import stored_fingerprint
from steerkit.conditions import Scaled
from steerkit.errors import AttachError, BaseModelMismatchError, LayerError, PolicyError, TrainingError
from steerkit.hub import HubArtefact
from steerkit.intervention import WeightAddition
from steerkit.maths.lowrank import (
    Delta,
    LowRank,
    add_to,
    compressed,
    inner,
    parts,
    scaled,
    total,
    transposed,
)
from steerkit.maths.lowrank import (
    interference as subspace_interference,
)
from steerkit.model import Fingerprint, find_decoder, refuse_unwritable, resolve_layers, unwrap
from steerkit.preferences.pairs import Pairs, digest, read_pairs
from steerkit.preferences.sources import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Source,
    check_one_base,
    live_weights,
    read_source,
)
from steerkit.types import Amount, Layers, Positions

if TYPE_CHECKING:
    from steerkit.preferences.policy import PolicyConfig


@dataclass(frozen=True, eq=False)
class PreferenceVector(HubArtefact):
    """A direction in weight space, `phi = theta+ - theta-`; frozen, and kept in float32 whatever the model's dtype.

    Made by `fit`, which trains both policies, or by `difference` from any two. Preference Vector, arXiv:2504.20106,
    equation 4. Vectors add, subtract and scale; two are compared by `cosine` only if their policies started from the same
    weights, LoRA's initial A included.

    Example:
        helpful = PreferenceVector.fit("helpful", model, tokenizer, pairs)
        with Controller(model, [helpful.add(torch.tensor([0.0, 0.5, 1.0]))]):
            model.generate(**three_prompts)
    """

    name: str
    deltas: Mapping[str, Delta] = field(repr=False)
    """The change of each parameter, by its name in the base model and of its shape; the others do not change."""
    fingerprint: Fingerprint | None = field(repr=False, default=None)
    made: Mapping[str, Any] = field(repr=False, default_factory=dict)
    """How it was made: policies, data, settings, held-out figures."""
    transposed: frozenset[str] = field(repr=False, default=frozenset())
    """Weights that their modules keep as `"input output"`, as GPT-2 does."""

    @classmethod
    def fit(
        cls,
        name: str,
        model: Any,
        tokenizer: Any,
        pairs: Pairs,
        *,
        config: "PolicyConfig | None" = None,
        output_dir: str | os.PathLike[str] | None = None,
    ) -> "PreferenceVector":
        """Train both twins by DPO and return their difference (equations 3 and 4 of the paper).

        The twins share base weights, seed, initial adapter, order of rows and the reference's log-probabilities, computed
        once; their first losses are log 2 and their changes point away from each other, or this raises. `made` holds
        the held-out figures of both, and the cosine between them (the paper's Table 5: -.47 to -.71).

        Args:
            name: the key for `Controller.using`.
            model: the base model; not changed.
            tokenizer: its tokenizer; not changed.
            pairs: `prompt`, `chosen`, `rejected`, as `train_policy` takes them.
            config: TRL's arguments with defaults for twins.
            output_dir: a folder for both runs (`towards`, `away`); the same call after a kill goes on where it was.

        Raises:
            PairsError: missing or empty columns, equal answers, nothing to train on.
            TrainingError: a run did not start at its reference, the twins saw other rows, or do not part.
            UnsupportedModelError: a PEFT-wrapped model, or weights that cannot be trained.
        """
        from steerkit.preferences.policy import References, check_twins, train_policy

        _check_name(name)
        rows = read_pairs(pairs)
        folder = None if output_dir is None else Path(output_dir)
        references = References()
        towards, away = (
            train_policy(
                model,
                tokenizer,
                rows,
                config=config,
                output_dir=None if folder is None else folder / side,
                reverse=reverse,
                references=references,
            )
            for side, reverse in (("towards", False), ("away", True))
        )
        check_twins(towards, away)
        sides = [cls.difference(policy, model, name=name, model=model) for policy in (towards, away)]
        between = sides[0].cosine(sides[1])
        if not between < 0:
            raise TrainingError(
                f"Twins must part: the cosine between their changes must be negative. Found {between:.3f}. The labels were "
                "not exchanged, or training did not move.",
                cosine=between,
            )
        made = {
            "pairs": len(rows),
            "digest": digest(rows),
            "settings": dict(towards.settings),
            "cosine_of_twins": between,
            "norms_of_twins": [side.norm() for side in sides],
            "towards_figures": dict(towards.figures),
            "away_figures": dict(away.figures),
        }
        return cls.difference(towards, away, name=name, model=model, made=made)

    @classmethod
    def difference(
        cls, towards: Any, away: Any, *, name: str, model: Any = None, made: Mapping[str, Any] | None = None
    ) -> "PreferenceVector":
        """Return `phi = theta_towards - theta_away`, in float32 and exactly: for LoRA `[B+, -B-] @ [A+; A-]`, rank 2r.

        How the policies were trained does not matter: DPO twins, two supervised runs (contrastive weight steering,
        arXiv:2511.05408), a policy and its base (a one-sided vector).

        Args:
            towards: a policy that shows the preference: a trained `Policy`, a PEFT model with one LoRA adapter, a model with
                whole weights, or a folder of either; folders are read one tensor at a time.
            away: its counterpart, of the same kind; or the base model, beside an adapter.
            name: the key for `Controller.using`.
            model: the base model, where neither policy brings it along (folders, trained weights): its fingerprint is
                taken, and every changed parameter must be one of its own.
            made: what to note in the file beside the names of the policies.

        Raises:
            PolicyError: equal policies, NaN, DoRA, modules saved whole, biases trained beside LoRA, pickled files.
            BaseModelMismatchError: policies of different bases, with other tensors or shapes, or unequal tokenizers.
            UnsupportedModelError: weights that are offloaded or quantised.
        """
        _check_name(name)
        decoder = None if model is None else find_decoder(model)
        # PEFT puts an adapter into the very model that it is given: as the other side it stands for the base.
        inside = {id(unwrap(policy)) for policy in (towards, away) if hasattr(policy, "get_base_model")}
        first, second = (
            live_weights(policy) if id(policy) in inside else read_source(policy, decoder) for policy in (towards, away)
        )
        check_one_base(first, second)
        deltas = {key: delta for key, delta in _subtract(first, second).items() if _nonzero(key, delta)}
        if not deltas:
            raise PolicyError(
                f"Two different policies are required. Found that {first.what} and {second.what} are equal, so that the "
                "vector would be zero. Train twins on pairs and on swapped pairs."
            )
        known = first.fingerprint or second.fingerprint
        if known is not None and first.changes is None and second.changes is None:
            known = known.without_values()  # these are weights after training
        swapped = first.swapped | second.swapped
        if model is not None:
            base = live_weights(unwrap(model))
            check_one_base(first, base)
            check_one_base(second, base)
            known, swapped = base.fingerprint, base.swapped
        noted = {"towards": first.what, "away": second.what, **(made or {})}
        vector = cls(name, deltas, known, noted, swapped & set(deltas))
        if decoder is not None:
            vector.add(1.0).check(decoder)
        return vector

    def __repr__(self) -> str:
        model = "" if self.fingerprint is None else f", model={self.fingerprint.name!r}"
        kept = "" if self.kept_energy == 1 else f", {100 * self.kept_energy:.1f} % of the energy kept"
        return (
            f"PreferenceVector({self.name!r}, {len(self.deltas)} parameters, rank {self.rank}, "
            f"norm {self.norm():.4g}{kept}{model})"
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder blocks in which it changes a parameter, in order."""
        return tuple(sorted({layer for layer in self._layer_of.values() if layer is not None}))

    @property
    def rank(self) -> int:
        """The largest rank over all parameters; of a dense change its smaller side."""
        return max((d.rank if isinstance(d, LowRank) else min(d.shape) for d in self.deltas.values()), default=0)

    @property
    def kept_energy(self) -> float:
        """The share of the squared norm that `compress` has kept, in a sum the least of its terms'; 1 if nothing was cut."""
        return float(self.made.get("kept_energy", 1.0))

    @property
    def _layer_of(self) -> dict[str, int | None]:
        return {name: _layer(name) for name in self.deltas}

    # Arithmetic, in float32.

    def __add__(self, other: Any) -> "PreferenceVector":
        if not isinstance(other, PreferenceVector):
            return NotImplemented
        self._check_same_base(other)
        deltas = {
            name: total([v.deltas[name] for v in (self, other) if name in v.deltas])
            for name in (*self.deltas, *(name for name in other.deltas if name not in self.deltas))
        }
        name = self.name if self.name == other.name else f"{self.name}+{other.name}"
        made: dict[str, Any] = {"sum": [dict(self.made), dict(other.made)]}
        if min(self.kept_energy, other.kept_energy) < 1:
            made["kept_energy"] = min(self.kept_energy, other.kept_energy)
        return PreferenceVector(
            name, deltas, self.fingerprint or other.fingerprint, made, self.transposed | other.transposed
        )

    def __radd__(self, other: Any) -> "PreferenceVector":
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum() starts from 0

    def __sub__(self, other: Any) -> "PreferenceVector":
        return self + (-other) if isinstance(other, PreferenceVector) else NotImplemented

    def __neg__(self) -> "PreferenceVector":
        return self * -1.0

    def __mul__(self, magnitude: Any) -> "PreferenceVector":
        """Scale by a number, or by one number a layer; layers that are not named are left out."""
        if isinstance(magnitude, Mapping):
            kept = self.only(layers=tuple(magnitude))
            depth = self._depth()
            at = {resolve_layers(layer, depth)[0]: float(value) for layer, value in magnitude.items()}
            factors = {name: at[cast(int, layer)] for name, layer in kept._layer_of.items()}
        elif isinstance(magnitude, int | float) and not isinstance(magnitude, bool):
            kept, factors = self, dict.fromkeys(self.deltas, float(magnitude))
        else:
            return NotImplemented
        if not all(math.isfinite(factor) for factor in factors.values()):
            raise PolicyError(f"A vector is scaled by finite numbers. Found {magnitude!r:.60}. Use 0 for none of it.")
        return replace(kept, deltas={name: scaled(delta, factors[name]) for name, delta in kept.deltas.items()})

    __rmul__ = __mul__

    def __truediv__(self, magnitude: float) -> "PreferenceVector":
        return self * (1.0 / magnitude)

    def norm(self) -> float:
        """Return the Euclidean norm over all entries (the Frobenius norm of the whole)."""
        return math.sqrt(max(0.0, sum(inner(delta, delta) for delta in self.deltas.values())))

    def dot(self, other: "PreferenceVector") -> float:
        """Return the sum of products of all entries."""
        self._check_same_base(other)
        return sum(inner(delta, other.deltas[name]) for name, delta in self.deltas.items() if name in other.deltas)

    def cosine(self, other: "PreferenceVector") -> float:
        """Return the cosine between two vectors; it means something only for policies that share their initial weights.

        LoRA runs from other initial A's have cosines near 0 however alike they act.
        """
        product = self.norm() * other.norm()
        if product == 0:
            raise PolicyError("A cosine needs two vectors that are not zero. Found a zero one. Check the magnitudes.")
        return max(-1.0, min(1.0, self.dot(other) / product))

    def with_norm(self, norm: float) -> "PreferenceVector":
        """Return the vector at another length: for instance a one-sided one at the length of the twins'.

        `||theta+ - theta-|| = n sqrt(2 - 2c)` for two sides of norm n and cosine c, so a comparison at magnitude 1 compares
        lengths as well as directions.
        """
        length = self.norm()
        if length == 0:
            raise PolicyError("A zero vector has no direction to lengthen. Check the magnitudes.")
        return self * (norm / length)

    def named(self, name: str) -> "PreferenceVector":
        """Return the same vector under another name."""
        return replace(self, name=name)

    def only(self, *, layers: Layers | None = None, modules: Iterable[str] | None = None) -> "PreferenceVector":
        """Return the part in some layers, or of parameters whose module's name ends in one of `modules`.

        Parameters outside the decoder blocks belong to no layer. The rest is named in `made["left_out"]`.

        Raises:
            LayerError: a layer in which nothing changes.
            PolicyError: modules of which none changes.
        """
        kept = dict(self.deltas)
        if layers is not None:
            wanted = set(resolve_layers(layers, self._depth()))
            missing = sorted(wanted - set(self.layers))
            if missing:
                raise LayerError(
                    f"Layer {missing[0]} does not change in {self.name!r}. Found changes in {self.layers}. Choose there.",
                    layer=missing[0],
                )
            kept = {name: delta for name, delta in kept.items() if _layer(name) in wanted}
        if modules is not None:
            ends = tuple(modules)
            for end in ends:
                if not any(_module_ends(name, end) for name in kept):
                    some = sorted({name.split(".")[-2] for name in kept if "." in name})
                    raise PolicyError(f"Some module must end in {end!r}. Found changes in {some}. Choose among them.")
            kept = {name: delta for name, delta in kept.items() if any(_module_ends(name, end) for end in ends)}
        if not kept:
            raise PolicyError(f"A part must hold some parameter. Found none left of {self.name!r}. Choose more.")
        left = sorted(set(self.deltas) - set(kept))
        made = {**self.made, "left_out": left} if left else self.made
        return replace(self, deltas=kept, made=made, transposed=self.transposed & set(kept))

    def compress(self, *, rank: int | None = None, energy: float | None = None) -> "PreferenceVector":
        """Return the nearest vector of a rank, or of the least rank a parameter that keeps a share of its energy.

        By QR of the factors and a small singular value decomposition; a low-rank change is never multiplied out. What is
        no matrix (biases, norms, experts) stays as it is. `kept_energy` of the result is the share of the whole squared norm.

        Args:
            rank: the largest rank of each parameter.
            energy: the share of each parameter's squared norm to keep, above 0 and at most 1. Exactly one of the two.

        Raises:
            PolicyError: neither or both, or out of range.
        """
        whole = rank is None or (isinstance(rank, int) and rank >= 1)
        if (rank is None) == (energy is None) or not whole or not (energy is None or 0 < energy <= 1):
            raise PolicyError(
                f"Exactly one of `rank` (at least 1) and `energy` (in (0, 1]) is required. Found rank={rank}, energy={energy}."
            )
        deltas: dict[str, Delta] = {}
        kept = before = 0.0
        for name, delta in self.deltas.items():
            if len(delta.shape) != 2:
                share = all_of = inner(delta, delta)
                deltas[name] = delta
            else:
                deltas[name], share, all_of = compressed(delta, rank=rank, energy=energy)
            kept, before = kept + share, before + all_of
        share = kept / before if before else 1.0
        return replace(self, deltas=deltas, made={**self.made, "kept_energy": self.kept_energy * share})

    # Use.

    def add(
        self,
        magnitude: Amount | Scaled = 1.0,
        *,
        layers: Layers | None = None,
        positions: Positions = "all",
        name: str | None = None,
    ) -> WeightAddition:
        """Return `theta = theta_base + m phi` as an intervention (equation 5 of the paper), m for each sample and layer.

        0 is the base model, 1 the paper's default, negative magnitudes invert the preference; above about 2 text tends to
        break. A probe that was fitted on the base model is not automatically valid under changed weights: measure it with
        `concept.score` on texts recorded inside the Controller.

        Args:
            magnitude: m: a number, one a sample, `(samples, layers)`, `{layer: either of the first two}`, or
                `reading.scaled(low, high)`.
            layers: decoder blocks; by default every changed parameter, in the blocks and outside of them.
            positions: tokens at which the weights differ; all by default, as merged weights would.
            name: the key within a Controller; the vector's name by default.

        Raises:
            AmountError: a magnitude that is no finite number or of the wrong shape.
            LayerError: a layer in which nothing changes.
        """
        chosen = tuple(magnitude) if layers is None and isinstance(magnitude, Mapping) else layers
        part = self if chosen is None else self.only(layers=chosen)
        depth = self._depth()
        if isinstance(magnitude, Mapping):
            magnitude = {resolve_layers(layer, depth)[0]: value for layer, value in magnitude.items()}
        order = part.layers if chosen is None else resolve_layers(chosen, depth)
        return WeightAddition(
            name or self.name,
            order,
            positions,
            magnitude,
            self.fingerprint,
            deltas=part.deltas,
            layer_of=part._layer_of,
        )

    def merge_into(self, model: Any, magnitude: float | Mapping[int, float] = 1.0, *, check_model: bool = True) -> Any:
        """Return a new model with `theta + magnitude * phi`: summed in float32, rounded once to the model's dtype.

        The given model is not changed; tied weights stay tied; magnitude 0 gives the same bits.

        Raises:
            BaseModelMismatchError: the vector was made on another base model, or for other shapes.
            UnsupportedModelError: an offloaded or quantised model.
            AttachError: an adapter is in the model, or a Controller is attached to it.
        """
        decoder = find_decoder(model)
        if decoder.model is not model or any(".base_layer." in name for name, _ in model.named_parameters()):
            raise AttachError(
                f"Weights are merged into a plain model. Found {type(model).__name__}. Merge or unload its adapter first."
            )
        if any(key.startswith("_steerkit") for key in model.__dict__):
            raise AttachError("Weights are merged into a model at rest. Found a Controller attached. Detach it first.")
        if check_model and self.fingerprint is not None:
            self.fingerprint.check(Fingerprint.of(model), repr(self.name))
        part = self * magnitude
        part.add(1.0).check(decoder)
        for name in part.deltas:
            refuse_unwritable(name, decoder.parameters.get(name))
        merged = copy.deepcopy(model)
        parameters = dict(merged.named_parameters())
        with torch.no_grad():
            for name, delta in part.deltas.items():
                if bool(parts(delta)[0].any()):  # adding 0 would turn -0.0 into 0.0
                    add_to(decoder.parameters[name].detach(), [(1.0, delta)], parameters[name].data)
        return merged

    def to_adapter(
        self, path: str | os.PathLike[str], magnitude: float | Mapping[int, float] = 1.0, *, rank: int | None = None
    ) -> float:
        """Write a PEFT LoRA folder that transformers, PEFT and vLLM load, and return its relative error.

        All modules get one rank, the largest, filled up with zeros: servers ask for it (vLLM: at most `max_lora_rank`).

        Args:
            path: the folder; it must not exist or be empty.
            magnitude: m, a number or one a layer: fixed in the file.
            rank: the largest rank, by truncation; needed for dense changes.

        Returns:
            `||phi - phi_written|| / ||phi||`; 0 where nothing had to be cut.

        Raises:
            PolicyError: changes that LoRA cannot hold (biases, norms, embeddings), or dense ones without `rank`.
            ArtefactError: a folder that is not empty or cannot be written.
        """
        part = self * magnitude
        unfit = [name for name in part.deltas if not name.endswith(".weight") or len(part.deltas[name].shape) != 2]
        unfit += [name for name in part.deltas if _layer(name) is None and name not in unfit]
        if unfit:
            raise PolicyError(
                f"LoRA changes linear modules in decoder blocks. Found {unfit[0]!r} ({len(unfit)} others do not fit either). "
                "Use merge_into, or leave them out with vector.only(...)."
            )
        if rank is None and any(not isinstance(delta, LowRank) for delta in part.deltas.values()):
            raise PolicyError("A dense change needs `rank` to become LoRA. Found none. Pass rank=64, for example.")
        cut = part if rank is None else part.compress(rank=rank)
        width = max(cast(LowRank, delta).rank for delta in cut.deltas.values())
        kinds = {name in self.transposed for name in cut.deltas}
        if len(kinds) > 1:
            raise PolicyError("LoRA needs one orientation of weights. Found both. Use merge_into.")
        tensors = {}
        for name, delta in cut.deltas.items():
            change = cast(LowRank, transposed(delta) if name in self.transposed else delta)
            grow = width - change.rank
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.nn.functional.pad(change.right, (0, 0, 0, grow)).contiguous()
            tensors[f"{module}.lora_B.weight"] = torch.nn.functional.pad(change.left, (0, grow)).contiguous()
        base = None if self.fingerprint is None else self.fingerprint.name
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": width,
            "lora_alpha": width,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": kinds == {True},
            "target_modules": _targets(cut.deltas, self._depth() if self.fingerprint is not None else None),
        }
        _write_folder(Path(path), config, tensors)
        return math.sqrt(max(0.0, 1 - cut.kept_energy / part.kept_energy)) if rank is not None else 0.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        tensors: dict[str, Tensor] = {}
        for name, delta in self.deltas.items():
            kinds = ("left", "right") if isinstance(delta, LowRank) else ("dense",)
            tensors.update({f"{kind}.{name}": part for kind, part in zip(kinds, parts(delta), strict=True)})
        header: dict[str, Any] = {
            "name": self.name,
            "parameters": list(self.deltas),
            "transposed": sorted(self.transposed),
            "dtype": "float32",
            "made": dict(self.made),
        }
        if self.fingerprint is not None:
            header["base_model"] = self.fingerprint.header()
            tensors["base_model.values"] = self.fingerprint.values
        storage.write(path, "preference_vector", header, tensors)

    @classmethod
    def from_stored(cls, stored: storage.Stored) -> "PreferenceVector":
        """Rebuild from a file that `storage.read` has checked."""
        fingerprint = stored_fingerprint(stored)
        names = stored.entry("parameters", list)
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise stored.broken(f"parameters={names!r:.60}")
        deltas: dict[str, Delta] = {}
        for name in names:
            if f"dense.{name}" in stored.tensors:
                shape = stored.tensors[f"dense.{name}"].shape
                if not shape.numel() or not shape:
                    raise stored.broken(f"an empty change of {name!r}")
                deltas[name] = stored.tensor(f"dense.{name}", *shape)
                continue
            left = stored.tensor(f"left.{name}", -1, -1)
            deltas[name] = LowRank(left, stored.tensor(f"right.{name}", left.shape[1], -1))
        swapped = stored.entry("transposed", list)
        if not set(map(str, swapped)) <= set(names):
            raise stored.broken(f"transposed={swapped!r:.60}")
        made = stored.entry("made", dict)
        energy = made.get("kept_energy", 1.0)
        if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1 + 1e-9:
            raise stored.broken(f"kept_energy={energy!r:.40}")
        return cls(stored.entry("name", str), deltas, fingerprint, made, frozenset(map(str, swapped)))

    def _depth(self) -> int:
        return self.fingerprint.depth if self.fingerprint is not None else max(self.layers, default=-1) + 1

    def _check_same_base(self, other: "PreferenceVector") -> None:
        if self.fingerprint is not None and other.fingerprint is not None:
            self.fingerprint.check(other.fingerprint, repr(self.name))
        for name, delta in self.deltas.items():
            if name in other.deltas and other.deltas[name].shape != delta.shape:
                raise BaseModelMismatchError(
                    f"Vectors must change one base model. Found {name!r} as {tuple(delta.shape)} in {self.name!r} and "
                    f"{tuple(other.deltas[name].shape)} in {other.name!r}."
                )


def cosines(vectors: Sequence[PreferenceVector]) -> Tensor:
    """Return the cosine between each two vectors, `"vector vector"` (Table 15 of the paper)."""
    return torch.tensor([[one.cosine(other) for other in vectors] for one in vectors], dtype=torch.float64)


def interference(vectors: Sequence[PreferenceVector], *, rank: int = 8, matrices: int = 32) -> float:
    """Return the subspace task interference of several vectors (Table 16 of the paper; arXiv:2412.00081).

    `|| (U^T U - I) S (V^T V - I) ||_1` of the leading `rank` singular parts of each vector, the mean over the `matrices`
    weights with the largest mean norm. 0 for vectors in orthogonal subspaces; it grows with their norms and their number.

    Raises:
        PolicyError: fewer than two vectors, or no matrix that all of them change.
    """
    shared = [
        name
        for name, delta in (vectors[0].deltas.items() if len(vectors) > 1 else ())
        if len(delta.shape) == 2 and all(name in each.deltas for each in vectors)
    ]
    if not shared:
        raise PolicyError("Interference needs two vectors that change one matrix. Found none. Pass such vectors.")
    for other in vectors[1:]:
        vectors[0]._check_same_base(other)
    size = {name: sum(math.sqrt(inner(v.deltas[name], v.deltas[name])) for v in vectors) for name in shared}
    largest = sorted(shared, key=lambda name: -size[name])[:matrices]
    return sum(subspace_interference([v.deltas[name] for v in vectors], rank) for name in largest) / len(largest)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise PolicyError(f"A preference vector needs a name. Found {name!r}. Pass 'helpful', for example.")


def _subtract(first: Source, second: Source) -> dict[str, Delta]:
    if first.changes is not None and second.changes is not None:
        names = [*first.changes, *(name for name in second.changes if name not in first.changes)]
        return {
            name: total(
                [
                    scaled(source[name], sign)
                    for source, sign in ((first.changes, 1.0), (second.changes, -1.0))
                    if name in source
                ]
            )
            for name in names
        }
    if first.changes is not None:
        return dict(first.changes)
    if second.changes is not None:
        return {name: scaled(delta, -1.0) for name, delta in second.changes.items()}
    assert first.get is not None
    assert second.get is not None
    return {name: first.get(name) - second.get(name) for name in first.shapes}


def _nonzero(name: str, delta: Delta) -> bool:
    for part in parts(delta):
        if not bool(part.isfinite().all()):
            raise PolicyError(
                f"A difference must be finite. Found NaN or infinity in {name!r}. Check the training run."
            )
    return inner(delta, delta) > 0


def _layer(name: str) -> int | None:
    """Return the decoder block of a parameter: the first number in its path."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return None if found is None else int(found.group(1))


def _module_ends(name: str, end: str) -> bool:
    module = name.rpartition(".")[0]
    return module == end or module.endswith("." + end)


def _targets(names: Iterable[str], depth: int | None) -> list[str]:
    """Return the modules' paths within a block where every block has them, else their whole paths."""
    modules = [name.removesuffix(".weight") for name in names]
    inside = [re.split(r"(?:^|\.)\d+\.", module, maxsplit=1)[-1] for module in modules]
    whole = depth is not None and all(inside.count(each) == depth for each in inside)
    return sorted(set(inside if whole else modules))


def _write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    storage.write_folder(
        folder,
        lambda inside: (
            save_file(dict(tensors), inside / ADAPTER_WEIGHTS, metadata={"format": "pt"}),
            (inside / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), "utf-8"),
        ),
    )
