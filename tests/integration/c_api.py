"""Runs a signature of a SavedModel by TensorFlow's C API, from a Python without TensorFlow.

python c_api.py LIBRARY MODEL INPUT_TENSOR OUTPUT_TENSOR TEXT...

Prints the output, flat, and its shape.
"""

import ctypes
import json
import sys

STRING = 7
NUMBERS = {1: ctypes.c_float, 3: ctypes.c_int32}  # TF_FLOAT, TF_INT32
library, model, input_name, output_name, *texts = sys.argv[1:]
c = ctypes.CDLL(library)
for name in (
    "TF_NewStatus TF_NewGraph TF_NewSessionOptions TF_LoadSessionFromSavedModel TF_AllocateTensor "
    "TF_GraphOperationByName TF_TensorData"
).split():
    getattr(c, name).restype = ctypes.c_void_p
c.TF_Message.restype = ctypes.c_char_p
c.TF_TensorByteSize.restype = ctypes.c_size_t
c.TF_Dim.restype = ctypes.c_int64


class Output(ctypes.Structure):
    _fields_ = [("operation", ctypes.c_void_p), ("index", ctypes.c_int)]


class LargeString(ctypes.Structure):  # a TF_TString that owns memory of its own
    _fields_ = [("size", ctypes.c_size_t), ("capacity", ctypes.c_size_t), ("data", ctypes.c_void_p)]


def pointer(value):
    return ctypes.c_void_p(value)


def check(status):
    assert c.TF_GetCode(pointer(status)) == 0, c.TF_Message(pointer(status))


def endpoint(graph, name):
    operation, _, index = name.partition(":")
    found = c.TF_GraphOperationByName(pointer(graph), operation.encode())
    assert found, name
    return Output(found, int(index))


status, graph, options = c.TF_NewStatus(), c.TF_NewGraph(), c.TF_NewSessionOptions()
tags = (ctypes.c_char_p * 1)(b"serve")
session = c.TF_LoadSessionFromSavedModel(
    pointer(options), None, model.encode(), tags, 1, pointer(graph), None, pointer(status)
)
check(status)

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
shape = (ctypes.c_int64 * 1)(len(texts))
tensor = c.TF_AllocateTensor(STRING, shape, 1, ctypes.c_size_t(24 * len(texts)))
strings = (LargeString * len(texts)).from_address(c.TF_TensorData(pointer(tensor)))
for string, text in zip(strings, texts, strict=True):
    content = text.encode()
    string.size, string.capacity = len(content) << 2 | 1, len(content) + 1
    string.data = libc.malloc(ctypes.c_size_t(len(content) + 1))
    ctypes.memmove(string.data, content + b"\0", len(content) + 1)

given, wanted = endpoint(graph, input_name), endpoint(graph, output_name)
inputs, outputs = (ctypes.c_void_p * 1)(tensor), (ctypes.c_void_p * 1)()
c.TF_SessionRun(
    pointer(session), None, ctypes.byref(given), inputs, 1, ctypes.byref(wanted), outputs, 1,
    None, 0, None, pointer(status),
)  # fmt: skip
check(status)
output = pointer(outputs[0])
number = NUMBERS[c.TF_TensorType(output)]
size = c.TF_TensorByteSize(output) // ctypes.sizeof(number)
answer = (number * size).from_address(c.TF_TensorData(output))
shape = [c.TF_Dim(output, axis) for axis in range(c.TF_NumDims(output))]
print("ANSWER", json.dumps([list(answer), shape]))
