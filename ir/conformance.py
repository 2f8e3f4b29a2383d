"""What a target's compiler would refuse or run slowly, found without it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import final


@final
@dataclass(frozen=True)
class Finding:
    """One rule that a node (empty: the file) breaks, why, and what mends it.

    An error keeps the target from building the model, or changes what it computes; anything else
    costs time.
    """

    rule: str
    node: str
    reason: str
    fix: str
    error: bool = True

    def __str__(self) -> str:
        where = f"'{self.node}': " if self.node else ""
        return f"{where}{self.reason} ({self.rule}); {self.fix}"


@final
@dataclass(frozen=True)
class Conformance:
    """All findings on a file, what was checked with, and what nobody checked here."""

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    unverified: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not any(finding.error for finding in self.findings)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "ok": self.ok}
