"""Name → pass class, from a literal list; adding a pass is one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.passes.allocate import Allocate
from octavo.passes.apply_structure import ApplyStructure
from octavo.passes.bound_ranges import BoundRanges
from octavo.passes.calibrate import Calibrate
from octavo.passes.canonicalize import Canonicalize
from octavo.passes.choose_kernels import ChooseKernels
from octavo.passes.clip_weights import ClipWeights
from octavo.passes.collect_moments import CollectMoments
from octavo.passes.correct_bias import CorrectBias
from octavo.passes.drop_blocks import DropBlocks
from octavo.passes.factor_low_rank import FactorLowRank
from octavo.passes.fold_scales import FoldScales
from octavo.passes.halve_constants import HalveConstants
from octavo.passes.insert_fake_quant import InsertFakeQuant
from octavo.passes.match_moments import MatchMoments
from octavo.passes.offer_options import OfferOptions
from octavo.passes.offer_structure import OfferStructure
from octavo.passes.place_quantizers import PlaceQuantizers
from octavo.passes.prune_channels import PruneChannels
from octavo.passes.prune_heads import PruneHeads
from octavo.passes.prune_weights import PruneWeights
from octavo.passes.recover import Recover
from octavo.passes.refine import Refine
from octavo.passes.repair_low_rank import RepairLowRank
from octavo.passes.rotate_residual import RotateResidual
from octavo.passes.rotate_values import RotateValues
from octavo.passes.round_gptq import RoundGptq
from octavo.passes.round_learned import RoundLearned
from octavo.passes.round_nupes import RoundNupes
from octavo.passes.round_squant import RoundSquant
from octavo.passes.round_uniquanf import RoundUniquanf
from octavo.passes.sensitivity import AnalyseSensitivity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo.passes.base import Pass

PASSES: Mapping[str, type[Pass]] = {
    pass_.name: pass_
    for pass_ in (
        Canonicalize,
        RotateResidual,
        RotateValues,
        PruneHeads,
        PruneChannels,
        FoldScales,
        DropBlocks,
        FactorLowRank,
        PruneWeights,
        Calibrate,
        BoundRanges,
        CollectMoments,
        ChooseKernels,
        HalveConstants,
        OfferOptions,
        AnalyseSensitivity,
        OfferStructure,
        Allocate,
        Refine,
        ApplyStructure,
        PlaceQuantizers,
        InsertFakeQuant,
        RoundGptq,
        RoundLearned,
        ClipWeights,
        RoundSquant,
        RoundNupes,
        RoundUniquanf,
        MatchMoments,
        CorrectBias,
        RepairLowRank,
        Recover,
    )
}
