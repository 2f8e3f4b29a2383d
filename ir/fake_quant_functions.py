"""What nodes of domain `octavo` compute, as functions of standard operators."""

from __future__ import annotations

import onnx_ir

# The steps between float4 numbers are 1/2 up to 2, 1 up to 4 and 2 up to 6. A tie goes to an even
# number of steps, whose code is the even one.
_FLOAT4 = """low = Constant <value_float: float = @qmin> ()
            high = Constant <value_float: float = @qmax> ()
            clipped = Clip (divided, low, high)
            half = Constant <value_float: float = 0.5> ()
            one = Constant <value_float: float = 1.0> ()
            two = Constant <value_float: float = 2.0> ()
            four = Constant <value_float: float = 4.0> ()
            size = Abs (clipped)
            small = Less (size, two)
            medium = Less (size, four)
            wide = Where (medium, one, two)
            step = Where (small, half, wide)
            steps = Div (clipped, step)
            rounded = Round (steps)
            codes = Mul (rounded, step)"""

FUNCTIONS = {
    "FakeQuant": """
        <opset_import: ["" : 21], domain: "octavo">
        FakeQuant <qmin: float, qmax: float, spec: string> (x, scale, zero_point) => (y) {
            low = Constant <value_float: float = @qmin> ()
            high = Constant <value_float: float = @qmax> ()
            divided = Div (x, scale)
            rounded = Round (divided)
            shifted = Add (rounded, zero_point)
            clipped = Clip (shifted, low, high)
            centred = Sub (clipped, zero_point)
            y = Mul (centred, scale)
        }""",
    "FakeQuantBlocks": """
        <opset_import: ["" : 21], domain: "octavo">
        FakeQuantBlocks <qmin: float, qmax: float, spec: string>
            (x, scale, zero_point, blocked_shape) => (y) {
            low = Constant <value_float: float = @qmin> ()
            high = Constant <value_float: float = @qmax> ()
            shape = Shape (x)
            blocks = Reshape (x, blocked_shape)
            divided = Div (blocks, scale)
            rounded = Round (divided)
            shifted = Add (rounded, zero_point)
            clipped = Clip (shifted, low, high)
            centred = Sub (clipped, zero_point)
            scaled = Mul (centred, scale)
            y = Reshape (scaled, shape)
        }""",
    "FakeQuantBinary": """
        <opset_import: ["" : 21], domain: "octavo">
        FakeQuantBinary <qmin: float, qmax: float, spec: string> (x, scale, zero_point) => (y) {
            zero = Constant <value_float: float = 0.0> ()
            negative = Less (x, zero)
            opposite = Neg (scale)
            y = Where (negative, opposite, scale)
        }""",
    "FakeQuantFloat8": """
        <opset_import: ["" : 21], domain: "octavo">
        FakeQuantFloat8 <qmin: float, qmax: float, spec: string> (x, scale, zero_point) => (y) {
            divided = Div (x, scale)
            codes = Cast <to: int = 17> (divided)
            real = Cast <to: int = 1> (codes)
            y = Mul (real, scale)
        }""",
    "FakeQuantFloat4": f"""
        <opset_import: ["" : 21], domain: "octavo">
        FakeQuantFloat4 <qmin: float, qmax: float, spec: string> (x, scale, zero_point) => (y) {{
            divided = Div (x, scale)
            {_FLOAT4}
            y = Mul (codes, scale)
        }}""",
    "FakeQuantFloat4Blocks": f"""
        <opset_import: ["" : 21], domain: "octavo">
        FakeQuantFloat4Blocks <qmin: float, qmax: float, spec: string>
            (x, scale, zero_point, blocked_shape) => (y) {{
            shape = Shape (x)
            blocks = Reshape (x, blocked_shape)
            divided = Div (blocks, scale)
            {_FLOAT4}
            scaled = Mul (codes, scale)
            y = Reshape (scaled, shape)
        }}""",
    "FakeQuantHalf": """
        <opset_import: ["" : 21], domain: "octavo">
        FakeQuantHalf <spec: string> (x) => (y) {
            low = Constant <value_float: float = -65504.0> ()
            high = Constant <value_float: float = 65504.0> ()
            clipped = Clip (x, low, high)
            half = Cast <to: int = 10> (clipped)
            y = Cast <to: int = 1> (half)
        }""",
    "FakeQuantLevels": """
        <opset_import: ["" : 21], domain: "octavo">
        FakeQuantLevels <axis: int, bits: int> (x, levels) => (y) {
            y = Identity (x)
        }""",
    "FakeQuantDynamic": """
        <opset_import: ["" : 21], domain: "octavo">
        FakeQuantDynamic (x) => (y) {
            codes, scale, zero_point = DynamicQuantizeLinear (x)
            y = DequantizeLinear (codes, scale, zero_point)
        }""",
}


def function(name: str) -> onnx_ir.Function:
    """The function of that name."""
    import onnx.parser

    return onnx_ir.serde.deserialize_function(onnx.parser.parse_function(FUNCTIONS[name]))
