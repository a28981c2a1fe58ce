"""Weights and activations of an ONNX model in 8 bits, for small and fast programs."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor


def to_int8(model: bytes, images: Tensor) -> bytes:
    """Quantizes the layers of a model of ONNX to 8 bits; the preparation of images stays as it is.

    The ranges of the activations are those on some images (static quantization), each output
    channel of the weights has its own range.

    Args:
        model: the content of the file.
        images: of the training set, uint8.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(images.split(32))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        given, prepared, quantized = (Path(folder, f"{name}.onnx") for name in "gpq")
        given.write_bytes(model)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        graph = (changed := onnx.load(prepared)).graph
        layers = [
            node
            for node in graph.node
            if node.op_type in ("Conv", "Gemm", "MatMul")
            and not {"rows", "columns"} & set(node.input)  # those resize the images
        ]
        biases = {node.input[2] for node in layers if len(node.input) == 3}
        for tensor in graph.initializer:
            if tensor.name in biases and len(tensor.dims) == 2:
                del tensor.dims[0]  # (1, classes) of the perceptron: the quantizer needs (classes)
        for known in [value for value in graph.value_info if value.name in biases]:
            graph.value_info.remove(known)  # the former shape
        onnx.save(changed, prepared)
        quantization.quantize_static(
            prepared,
            quantized,
            Images(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            nodes_to_quantize=[node.name for node in layers],
        )
        return quantized.read_bytes()
