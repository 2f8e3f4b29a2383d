"""Operators that the parser of TensorRT has no importer for, and what avoids each."""

from __future__ import annotations

from collections.abc import Mapping

COMPILE = "compile the float model with octavo for this target"
_CONSTANT = "canonicalize computes it where its inputs are constant; else leave it out of the model"
# operators: why the parser refuses them, what to do.
_GROUPS: Mapping[tuple[str, ...], tuple[str, str]] = {
    ("QLinearConv", "QLinearMatMul", "QLinearAdd", "ConvInteger"): (
        "the parser has no integer operators",
        "export Q and DQ around float operators (QDQ format)",
    ),
    ("MatMulInteger", "DynamicQuantizeLinear"): (
        "the parser has no activations that are quantized at run time",
        f"{COMPILE}, with --calibration; weight-only is choose-kernels{{weight-only=true,bits=4}}",
    ),
    ("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitCast"): (
        "the parser has no bit operators: packed weights cannot be unpacked",
        "store weights as INT8 or INT4 initializers in front of DequantizeLinear",
    ),
    (
        "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement", "SequenceAt",
        "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
        "SequenceMap", "SplitToSequence",
    ): (
        "the parser has tensors alone, no sequences or optional values",
        "export with Split and Concat instead of lists of tensors",
    ),
    (
        "StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer",
        "ImageDecoder",
    ): (
        "the parser has no operators of text and image files",
        "cut the model behind it and do this part in front of the engine",
    ),
    ("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"): (
        "the parser has no losses",
        "export the network without its loss, as for inference",
    ),
    ("Bernoulli", "Multinomial"): (
        "the parser has no draws from a distribution",
        "export in evaluation mode, or draw outside of the engine",
    ),
    ("Compress", "Unique"): (
        "how many elements it makes depends on the data",
        "use Where or TopK with a fixed size, or cut the model in front of it",
    ),
    (
        "AffineGrid", "CenterCropPad", "Col2Im", "CumProd", "DFT", "DeformConv", "Det",
        "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "SwiGLU",
    ): ("the parser has no importer for it", _CONSTANT),
}  # fmt: skip
REFUSED = {op_type: found for names, found in _GROUPS.items() for op_type in names}
