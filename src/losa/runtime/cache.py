"""A cache of keys and values that grows in place."""

from inspect import signature
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 256  # tokens by which it grows at least


class RoomyLayer(DynamicLayer):
    """A layer of the cache that keeps room for more tokens, where transformers' own copies all of it for every token.

    Attributes:
        rooms: keys and values, `[batch, heads, tokens that fit, width]` each.
        length: tokens held; what is behind them is not initialised.
        fits: tokens up to which it need not grow; 0 while somebody else may look at what would be written over: the rooms are
            what somebody brought, or a copy's, or there are views of tokens that were forgotten.
        plan: what the compiled step decoded the last token by (`decode.DecodeStep`); None where it came another way.
    """

    rooms: list[Tensor]
    length: int
    fits: int
    plan: Tensor | None = None

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def __copy__(self) -> Self:
        """Of the same tokens; what comes next goes to a room of its own."""
        made = type(self).__new__(type(self))
        made.__dict__ = vars(self) | {"rooms": list(self.rooms), "fits": 0}
        return made

    @property
    def keys(self) -> Tensor | None:
        """`[1, heads, tokens, width]`, a view; None while there is nothing."""
        return self._held(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._set(0, keys)

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self._held(1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._set(1, values)

    def _held(self, index: int) -> Tensor | None:
        return self.rooms[index][:, :, : self.length] if self.rooms[index].ndim == 4 else None

    def _set(self, index: int, held: Tensor | None) -> None:
        rooms: list[Tensor] = self.__dict__.setdefault("rooms", [torch.empty(0), torch.empty(0)])
        rooms[index] = torch.empty(0) if held is None else held
        self.length = rooms[index].shape[2] if rooms[index].ndim == 4 else 0
        self.fits = 0

    def reserve(self, tokens: int) -> None:
        """Room for so many more, that may be written to: what `torch.inference_mode` made may not be, outside of it."""
        needed = self.length + tokens
        if needed > self.fits or (self.rooms[0].is_inference() and not torch.is_inference_mode_enabled()):
            self.rooms = [self._grown(held, needed) for held in self.rooms]
            self.fits = self.rooms[0].shape[2]

    def _grown(self, held: Tensor, needed: int) -> Tensor:
        room = held.new_empty(*held.shape[:2], needed + max(ROOM, needed // 4), held.shape[3])
        room[:, :, : self.length] = held[:, :, : self.length]
        return room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends, as the Cache API asks."""
        self.plan = None
        if not self.length:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        tokens = key_states.shape[2]
        self.reserve(tokens)
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, self.length : self.length + tokens] = states
        self.length += tokens
        keys, values = (room[:, :, : self.length] for room in self.rooms)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; a negative number, as the Cache API has it. A positive one is how many to keep, where the
        installed transformers still gives that."""
        if tokens_to_remove > 0 and "max_length" not in signature(DynamicLayer.crop).parameters:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}, expected minus the number of tokens to forget")
        kept = tokens_to_remove if tokens_to_remove > 0 else max(0, self.length + tokens_to_remove)
        if kept < self.length:
            self.length, self.fits = kept, 0

    def reset(self) -> None:
        """Forgets all tokens."""
        self.plan, self.keys, self.values, self.is_initialized = None, None, None, False

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length
