"""Low-rank adapters as data: which matrices have one, of which rank and weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from entangle.errors import UserError


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """``x W`` becomes ``x W + (alpha / rank) x A B``; A is drawn, B begins at zero, and W is to be left as it is.

    Attributes:
      rank: r, width of the adapters.
      alpha: their weight, times the rank.
      targets: the matrices that have one, by path within a layer or the end of it, e.g. ``attention/query`` or ``query``.
        Where query, key and value are one matrix, as in GPT-2, the three names together are its own (``qkv``).
      dropout: share of an adapter's inputs that are dropped, in rows that are given a seed (``PairBatch.seeds``).

    Raises:
      UserError: a number is out of range, or there is no target.

    References:
      Hu et al., arXiv 2106.09685; the drawing of A and the scaling are those of PEFT.

    Example:
      >>> lora = LoraConfig(rank=8, alpha=16.0, targets=("attention/query", "down"))
      >>> lora.scale, lora.adapts("attention/query"), lora.adapts("attention/key"), lora.adapts("feed_forward/down")
      (2.0, True, False, True)
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what adapts nothing."""
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise UserError(f"LoRA: rank must be a positive whole number, got {self.rank!r}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"LoRA: alpha must be a positive number, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA: dropout must be 0 or more and below 1, got {self.dropout!r}")
        if not self.targets:
            raise UserError("LoRA: name at least one target, e.g. query")

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied with."""
        return self.alpha / self.rank

    def adapts(self, path: str) -> bool:
        """Whether a matrix has an adapter, by its path within a layer."""
        return bool(self.adapted_by(path))

    def adapted_by(self, path: str) -> set[str]:
        """The targets that a matrix has its adapter from."""
        parts = [path.removesuffix(_FUSED) + part for part in _PARTS] if f"/{path}".endswith(f"/{_FUSED}") else []
        by_part = [_ends(part, self.targets) for part in parts]
        return _ends(path, self.targets) | (set().union(*by_part) if all(by_part) else set())


def _ends(path: str, targets: Iterable[str]) -> set[str]:
    return {target for target in targets if f"/{path}".endswith(f"/{target}")}


_FUSED, _PARTS = "qkv", ("query", "key", "value")


LORA_PRESETS: Mapping[str, LoraConfig] = {
    # Yuan et al., arXiv 2410.13828, appendix
    "paper": LoraConfig(rank=64, alpha=128.0, targets=("query", "key", "value"), dropout=0.05),
    "attention": LoraConfig(rank=16, alpha=32.0, targets=("query", "key", "value", "out")),
    "all": LoraConfig(rank=16, alpha=32.0, targets=("query", "key", "value", "out", "gate", "up", "down")),
}
"""Table of adapters that go by a name; ``paper`` is that of Yuan et al., arXiv 2410.13828."""


def lora_config(text: str) -> LoraConfig | None:
    """Adapters as a command line names them.

    Args:
      text: ``none``, a name of ``LORA_PRESETS``, or fields such as ``rank=16,alpha=32,targets=query+value,dropout=0.05``, of
        which a preset's name may come first.

    Raises:
      UserError: there is no such preset or field, or a value is none of its field.

    Example:
      >>> lora_config("none"), lora_config("paper,rank=8").rank, lora_config("rank=4,alpha=8,targets=query+down").targets
      (None, 8, ('query', 'down'))
    """
    if text == "none":
        return None
    first, _, rest = text.partition(",")
    fields: dict[str, Any] = {}
    if "=" in first:
        rest = text
    elif first in LORA_PRESETS:
        fields = dataclasses.asdict(LORA_PRESETS[first])
    else:
        raise UserError(
            f"LoRA {text!r}: choose from none, {', '.join(LORA_PRESETS)}, or write rank=16,alpha=32,targets=..."
        )
    kinds: Mapping[str, Callable[[str], Any]] = {
        "rank": int,
        "alpha": float,
        "targets": lambda names: tuple(names.split("+")),
        "dropout": float,
    }
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        try:
            fields[name] = kinds[name](value)
        except (KeyError, ValueError):
            raise UserError(f"LoRA {text!r}: {part!r} is none of rank=, alpha=, targets= and dropout=") from None
    if missing := [name for name in ("rank", "alpha", "targets") if name not in fields]:
        raise UserError(f"LoRA {text!r}: {' and '.join(missing)} missing")
    return LoraConfig(**fields)
