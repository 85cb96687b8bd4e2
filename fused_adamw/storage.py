"""What is kept of a param between steps, by its group's options: keys, dtypes, conversions.

The codes themselves are in formats.py. A moment in 8 bits has two tensors in the state, `exp_avg_q`
and `exp_avg_scale`: keys of its own, so that torch refuses the state rather than taking codes for
numbers.

A remainder's 16 bits are kept as a bfloat16 tensor, though they are no number (they may look like
NaN): `.view(torch.int16)` reads them. Neither gloo nor NCCL carries int16, so checkpoints could not
be gathered; and who casts states to the param's dtype, as torch's own `load_state_dict` does,
leaves them alone.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import formats
from .kernels import table as t
from .layouts import same_strides
from .shards import is_sharded, row_of_shard

StateDtype: TypeAlias = torch.dtype | Literal["int8", "float32", "bfloat16"] | None
OPTIONS: dict[str, Any] = {  # of a group, and their defaults
    "master_weights": False,
    "stochastic_rounding": False,
    "state_dtype": None,
    "seed": 0,
}
FLAT_VECTOR = 65536  # elements from which on a vector is no norm or bias, but many params in a row
REMAINDER, MASTER = "master_remainder", "master_param"
_DTYPES: dict[Any, torch.dtype | None] = {
    None: None,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.uint8,
}


def options_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Values of the storage options that the group has; none where its keys are torch's alone."""
    if group.keys().isdisjoint(OPTIONS):  # the common case, quicker so
        return ()
    return tuple([group[key] for key in OPTIONS if key in group])


def state_dtypes(given: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Dtypes of first and second moments: uint8 for 8 bits, None for what is updated.

    Raises:
        ValueError: no such format.
    """
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
    try:
        first, second = (_DTYPES[x] for x in pair)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"Invalid state_dtype: {given!r} (want None for the dtype of the param or its master, "
            "torch.float32, torch.bfloat16 or 'int8', or a pair of them for exp_avg and exp_avg_sq)"
        ) from None
    return first, second


def named(given: Any) -> Any:
    """A valid `state_dtype` as groups keep it: by name, since torch gathers no dtypes.

    `get_optimizer_state_dict` raises for them where it gathers or offloads.
    """
    if isinstance(given, (tuple, list)):
        return tuple(map(named, given))
    return str(given).removeprefix("torch.") if isinstance(given, torch.dtype) else given


def check_options(group: Mapping[str, Any]) -> None:
    """Raise ValueError for storage options of a group that mean nothing."""
    state_dtypes(group.get("state_dtype"))
    stored = [key for key in OPTIONS if key != "seed" and group.get(key, OPTIONS[key])]
    if group.get("differentiable") and stored:
        raise ValueError(
            f"A group with differentiable=True is updated by torch's functional AdamW, which does "
            f"not know {', '.join(stored)}: leave them out there."
        )
    seed = group.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"Invalid seed: {seed!r} (want an int in [0, 2^63))")


class Storage(NamedTuple):
    """How one param and its moments are stored."""

    exp_avg: torch.dtype | None  # uint8: 8 bits; None: as it is, at first the param's own
    exp_avg_sq: torch.dtype | None
    master: torch.dtype | None  # what its bits are: int16, a remainder; float32, a copy
    stochastic: bool
    amsgrad: bool

    @property
    @functools.cache  # noqa: B019 - a few storages, and thousands of params that ask
    def moments(self) -> Mapping[str, torch.dtype | None]:
        """Names of the moments, and their dtypes."""
        dtypes = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {**dtypes, "max_exp_avg_sq": self.exp_avg_sq} if self.amsgrad else dtypes

    @property
    def plain(self) -> bool:
        """Whether everything is a floating-point number, rounded to nearest."""
        return self.master is None and not self.stochastic and not self.quantised

    @property
    def random(self) -> bool:
        """Whether some store is rounded stochastically."""
        return self.stochastic or self.exp_avg_sq == torch.uint8

    @property
    def quantised(self) -> bool:
        """Whether a moment is in 8 bits."""
        return torch.uint8 in (self.exp_avg, self.exp_avg_sq)

    @property
    @functools.cache  # noqa: B019 - as above
    def payloads(self) -> tuple[str, ...]:
        """Keys of the moments themselves, without their exponents."""
        return tuple(keys_of(name, dtype)[0] for name, dtype in self.moments.items())

    @property
    @functools.cache  # noqa: B019 - as above
    def keys(self) -> tuple[str, ...]:
        """Keys of the state besides "step"."""
        keys = [k for name, dtype in self.moments.items() for k in keys_of(name, dtype)]
        if self.master is not None:
            keys.append(REMAINDER if self.master == torch.int16 else MASTER)
        return tuple(keys)


def describe(storage: Storage, param: Tensor) -> str:
    """One line for people: how a param and its moments are stored."""

    def name(dtype: torch.dtype | None) -> str:
        if dtype == torch.uint8:
            return f"8 bits in blocks of {t.QUANT_BLOCK}"
        if dtype == torch.int16:
            return "16 bits"
        return str(param.dtype if dtype is None else dtype).removeprefix("torch.")

    parts = [name(param.dtype)]
    if storage.master is not None:
        parts[0] += f" with {storage.keys[-1]} {name(storage.master)}"
    parts += [f"{moment} {name(dtype)}" for moment, dtype in storage.moments.items()]
    return ", ".join(parts) + (", stochastic rounding" if storage.stochastic else "")


def keys_of(name: str, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Keys under which a moment is kept."""
    return (f"{name}_q", f"{name}_scale") if dtype == torch.uint8 else (name,)


def storage_of(group: Mapping[str, Any], param: Tensor) -> Storage:
    """How a param of the group is stored.

    What `is_quantised` excludes from 8 bits has its moments in float32, as a master's are unless
    the group says otherwise.
    """
    first, second = state_dtypes(group.get("state_dtype"))
    if torch.uint8 in (first, second) and not is_quantised(param):
        first, second = (torch.float32 if x == torch.uint8 else x for x in (first, second))
    master = None
    if group.get("master_weights", False):
        master = {torch.bfloat16: torch.int16, torch.float16: torch.float32}.get(param.dtype)
    if master is not None:
        first, second = (torch.float32 if x is None else x for x in (first, second))
    stochastic = bool(group.get("stochastic_rounding", False)) and torch.bfloat16 in (
        param.dtype if master is None else None,
        second,
    )
    return Storage(first, second, master, stochastic, bool(group["amsgrad"]))


def is_quantised(param: Tensor) -> bool:
    """Whether moments of the param are kept in 8 bits where its group says so.

    Matrices, row-major, whose rows are whole quantisation blocks, so that no block is cut when
    they are sharded, and the keys of a state are the same in every sharding: norms, biases and
    convolutions of three channels, which have few elements, are out. So is a DTensor cut within
    rows into parts that are no whole blocks. Flat vectors, FSDP1's say, are nobody's to shard.

    Asked of the whole, which all ranks know alike, never of the part that lies on one of them.
    """
    if not param.is_contiguous():  # of a DTensor: the whole
        return False
    if param.dim() < 2:
        return param.dim() == 1 and len(param) >= FLAT_VECTOR and not is_sharded(param)
    row = param.shape[1:].numel() if not is_sharded(param) else row_of_shard(param)
    return row > 0 and row % t.QUANT_BLOCK == 0


def check_storage(name: str, param: Tensor, group: Mapping[str, Any]) -> None:
    """Raise TypeError where a param's dtype cannot be stored as its group wants."""
    dtypes = state_dtypes(group.get("state_dtype"))
    if param.is_complex() and dtypes != (None, None):
        wanted = f"state_dtype={group['state_dtype']!r}"
        cure = "their moments are complex: leave state_dtype=None in their group"
    elif param.dtype == torch.float64 and torch.uint8 in dtypes:
        wanted = f"state_dtype={group['state_dtype']!r}"
        cure = "8-bit moments are computed in float32: leave state_dtype=None in their group"
    elif (
        param.dtype == torch.float64
        and dtypes[1] == torch.bfloat16
        and group.get("stochastic_rounding", False)
    ):
        wanted = f"stochastic_rounding=True and state_dtype={group['state_dtype']!r}"
        cure = (
            "it rounds float32 to bfloat16: leave stochastic_rounding out in their group, or keep "
            "second moments in another dtype"
        )
    elif param.dtype == torch.float16 and group.get("stochastic_rounding", False):
        if group.get("master_weights", False):
            return
        wanted = "stochastic_rounding=True"
        cure = "it rounds to bfloat16 alone: use bfloat16 params, or master_weights=True"
    else:
        return
    raise TypeError(f"{name} is {param.dtype}, which does not go with {wanted}; {cure}.")


def scale_shape(like: Tensor) -> tuple[int, ...]:
    """Shape of the exponents of a param's moments: those of a row in a row."""
    if like.dim() < 2:
        return (-(-like.numel() // t.QUANT_BLOCK),)
    return like.shape[0], like.shape[1:].numel() // t.QUANT_BLOCK


def lacking(storage: Storage, like: Tensor, state: Mapping[str, Any]) -> list[str]:
    """Keys that are not in the state of a param laid out as `like`, or not as they shall be."""
    keys: list[str] = []
    for name, dtype in storage.moments.items():
        own = keys_of(name, dtype)
        x = state.get(own[0])
        if dtype is None and name == "max_exp_avg_sq":  # the kernel knows one dtype for both
            dtype = state["exp_avg_sq"].dtype if "exp_avg_sq" in state else like.dtype
        if (
            x is None
            or own[-1] not in state
            or (dtype == torch.uint8 and not state[own[-1]].is_contiguous())
            or (dtype is not None and x.dtype != dtype)
            or not same_strides(like.shape, x.stride(), like.stride())
        ):
            keys += own
    if storage.master is not None:
        key = storage.keys[-1]
        x = state.get(key)
        if (
            x is None
            or x.dtype == torch.int16  # a remainder's bits as such
            or not same_strides(like.shape, x.stride(), like.stride())
        ):
            keys.append(key)
    return keys


def make(
    storage: Storage,
    like: Tensor,
    state: Mapping[str, Any],
    keys: Collection[str],
    made: dict[str, Tensor],
) -> None:
    """Put new tensors for the keys beside those made before.

    Of what the state has, in whatever form, and zeros where it has nothing.
    """
    for name, dtype in storage.moments.items():
        own = keys_of(name, dtype)
        if set(own).isdisjoint(keys):
            continue
        x = decoded(name, state)
        if dtype == torch.uint8:
            made.update(_quantised(name, x, like, keys))
            continue
        if dtype is None:
            twin = "exp_avg_sq" if name == "max_exp_avg_sq" else name
            given = made.get(twin, state.get(twin))  # both second moments have one dtype
            dtype = like.dtype if given is None else given.dtype
        new = made[name] = torch.zeros_like(like, dtype=dtype, requires_grad=False)
        if x is not None:
            new.copy_(x)
    if storage.master is not None and storage.keys[-1] in keys:
        key = storage.keys[-1]
        made[key] = _made_master(key, like, state)


def converted(storage: Storage, like: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the state has, as it shall be kept, where it is kept otherwise; see `make`."""
    made: dict[str, Tensor] = {}
    keys = [key for key in lacking(storage, like, state) if known(key, state)]
    make(storage, like, state, keys, made)
    return made


def known(key: str, state: Mapping[str, Any]) -> bool:
    """Whether the state has what is kept under the key, in whatever form."""
    if key in (REMAINDER, MASTER):
        return REMAINDER in state or MASTER in state
    name = key.removesuffix("_q").removesuffix("_scale")
    return name in state or f"{name}_q" in state


def unwanted(storage: Storage, state: Mapping[str, Any]) -> list[str]:
    """Keys of the state in which the same is kept in another form."""
    forms = {f"{name}{end}" for name in storage.moments for end in ("", "_q", "_scale")}
    return [key for key in state if key in forms | {REMAINDER, MASTER} and key not in storage.keys]


def decoded(name: str, state: Mapping[str, Any]) -> Tensor | None:
    """A moment as a floating-point tensor; None where there is none."""
    if name in state:
        plain: Tensor = state[name]
        return plain
    code, scale = state.get(f"{name}_q"), state.get(f"{name}_scale")
    if code is None or scale is None:
        return None
    return decode(name, code, scale)


def decode(name: str, code: Tensor, scale: Tensor) -> Tensor:
    """A moment in float32 from its codes and exponents; blocks are row-major."""
    values = formats.decode_signed if name == "exp_avg" else formats.decode_unsigned
    return values(code.reshape(-1), scale.reshape(-1)).view(code.shape)


def encoded(name: str, x: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and exponents of a moment [n]; second ones by random bits, or else to nearest."""
    if name == "exp_avg":
        return formats.encode_signed(x)
    if random is None:
        random = torch.full_like(x, 2**31, dtype=torch.int64)
    return formats.encode_unsigned(x, random)


def _quantised(
    name: str, x: Tensor | None, like: Tensor, keys: Collection[str]
) -> dict[str, Tensor]:
    """Codes and exponents as the state keeps them, rounded to nearest: both, or zeros for keys."""
    own = dict(zip(keys_of(name, torch.uint8), (like.shape, scale_shape(like)), strict=True))
    if x is None or not x.numel():
        zeros = functools.partial(torch.zeros, dtype=torch.uint8, device=like.device)
        return {key: zeros(shape) for key, shape in own.items() if key in keys}
    made = encoded(name, x.to(like.device, torch.float32).reshape(-1))
    return {key: part.view(own[key]) for key, part in zip(own, made, strict=True)}


def master_of(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """What is updated, in float32, a new tensor: the master, or a copy of the param."""
    if REMAINDER in state:
        return formats.decode_remainder(param, state[REMAINDER].view(torch.int16))
    if MASTER in state:
        return formats.decode_master(param, state[MASTER])
    return param.to(torch.float32, copy=True)


def _made_master(key: str, param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """A remainder or a copy: of the master that the state has if the param shows it, else of it."""
    master = param.detach().float()
    if MASTER in state:
        given = state[MASTER].to(param.device, torch.float32)
        shown = formats.encode_remainder(given)[0] if key == REMAINDER else given.to(param.dtype)
        master = torch.where(shown == param, given, master)
    elif REMAINDER in state and key == REMAINDER:
        return torch.empty_like(param).copy_(state[REMAINDER].view(torch.bfloat16))
    x = master
    if key == REMAINDER:
        x = formats.encode_remainder(master)[1].view(torch.bfloat16)
    return torch.empty_like(param, dtype=x.dtype, requires_grad=False).copy_(x)
