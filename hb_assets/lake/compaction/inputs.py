"""Inputs of a merge: the published file, pending fragments, and what tells that a row came before.

A row may come again after a drain died, after its fragment was pruned, or after its user was
forgotten: other fragments, watermarks, lists of erased rows and tombstones tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hb_assets.lake.files import erased
from hb_assets.lake.files.consolidated import Current
from hb_assets.lake.files.fragments import Fragment
from hb_assets.lake.files.tombstones import Cutoffs
from hb_assets.lake.storage.layout import FragmentName
from hb_assets.lake.storage.store import Lake


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is merged.

    Attributes:
        base: the published file, if there is one.
        new: pending fragments.
        included: fragments that `base` includes and that may hold rows of `new`, after a drain that
            died between publication and acknowledgement; survivors alone wouldn't tell.
        unread: such fragments that can't be read any more.
        erased_before: lists of identities that were counted as erased before they came here.
        watermark: per source shard the entry id up to which `base` includes every row there ever
            was: such a row can only come again.
        erased: users whose rows are to go, each with the latest arrival that goes by source shard.
    """

    base: Path | None
    new: Sequence[Path]
    included: Sequence[Path] = ()
    unread: Sequence[FragmentName] = ()
    erased_before: Sequence[Path] = ()
    watermark: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    erased: Mapping[str, Cutoffs] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether no row came before, and none has to go: the key and the arrival tell all."""
        known = self.included or self.unread or self.erased_before or self.watermark
        return not (known or self.erased)

    @classmethod
    def of(
        cls, lake: Lake, base: Current | None, new: Sequence[Fragment], raw: Sequence[Fragment]
    ) -> Inputs:
        """The published file, pending fragments, and what tells that a row came before.

        Args:
            lake: which lake.
            base: the published file, if there is one.
            new: pending fragments.
            raw: all fragments that are there.
        """
        paths = [one.path for one in new]
        known = erased.near(lake, [one.name for one in new])
        if base is None:
            return cls(None, paths, erased_before=known)
        there = {str(one.name): one.path for one in raw}
        near = [
            name
            for name in map(FragmentName.parse, sorted(base.names))
            if name is not None and any(name.overlaps(other.name) for other in new)
        ]
        included = [there[str(name)] for name in near if str(name) in there]
        # one that was pruned lies below the mark
        unread = [n for n in near if str(n) not in there and n.last > base.metadata.mark_of(n)]
        again = (one.name for one in new if base.metadata.reaches(one.name))
        watermark = {name.source: base.metadata.mark_of(name) for name in again}
        return cls(base.path, paths, included, unread, known, watermark)
