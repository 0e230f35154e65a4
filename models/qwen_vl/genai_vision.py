"""Qwen2.5-VL's vision tower as Microsoft's recipe for ONNX Runtime GenAI gives it.

The recipe (github.com/microsoft/olive-recipes, Qwen-Qwen2.5-VL-3B-Instruct/builtin) exports a tower whose attention is
one packed operator with dynamo at opset 20, and lets Olive (github.com/microsoft/Olive, passes/onnx/graph_surgeries.py)
replace the operator. What its published steps make of a small model was looked at node by node; this module gives the
same structure with code of its own:

    query, key, value [1, heads, P, head_dim], rotary embedding applied
      -> Transpose, Reshape to [1, P, heads * head_dim] -> captured by
    Loop over the windows i (in blocks with full attention: over the frames of all images)
        start, end = bounds[i], bounds[i + 1]         bounds: int32 [windows + 1]
        MultiHeadAttention (com.microsoft) of query, key and value [start : end] -> Concat to what is carried
      -> Reshape to [1, P, heads, head_dim] -> output projection

for every block, the last one included. Order of the windows, bounds and rotary tables are computed in the graph from
`image_grid_thw` [images, 3], whose rows have to be equal: the first row's grid is taken for every image. GenAI calls
the file once for each image, and so do the clients in JavaScript.

The other replacement that Olive has, one `PackedMultiHeadAttention` (com.microsoft) for each block, runs on CUDA alone,
and the published recipes do not use it.
"""

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from vision import Vision

OPSET = 20
# What stands for the attention of a block between the export and its replacement.
PACKED = ("duet.test", "PackedAttention")


class Packed(Vision):
    """The tower for images of one grid, its attention left as an operator."""

    def sizes(self, grid: torch.Tensor):
        """Images, frames of each, rows and columns of tokens."""
        frames, rows, columns = grid[0, 0], grid[0, 1] // self.merge, grid[0, 2] // self.merge
        for size in (frames, rows, columns):
            torch._check(size.item() >= 1)
        return grid.shape[0], frames, rows, columns

    def order(self, images, frames, rows, columns) -> torch.Tensor:
        """The tokens of all images, window by window."""
        edge = self.window
        token = torch.arange(frames * rows * columns)
        # The recipe counts rows on through the frames, which is right for one frame; this is for any number.
        frame, row, column = token // (rows * columns), token // columns % rows, token % columns
        down, across = (rows + edge - 1) // edge, (columns + edge - 1) // edge
        window = (frame * down + row // edge) * across + column // edge
        order = torch.argsort((window * edge + row % edge) * edge + column % edge)
        return (torch.arange(images)[:, None] * (frames * rows * columns) + order[None, :]).reshape(-1)

    def bounds(self, images, frames, rows, columns) -> tuple[torch.Tensor, torch.Tensor]:
        """Where windows and where frames begin, in patches, int32 [windows + 1] and [frames + 1]."""
        edge, unit = self.window, self.merge**2
        down, across = (rows + edge - 1) // edge, (columns + edge - 1) // edge
        window = torch.arange(frames * down * across) % (down * across)
        height = torch.clamp(rows - window // across * edge, min=0, max=edge)
        width = torch.clamp(columns - window % across * edge, min=0, max=edge)
        windows = (height * width * unit)[None, :].expand(images, -1).reshape(-1)
        whole = (rows * columns * unit)[None].expand(frames * images)
        ends = (torch.cumsum(lengths, 0) for lengths in (windows, whole))
        return tuple(torch.nn.functional.pad(e, (1, 0)).to(torch.int32) for e in ends)

    def tables(self, images, frames, rows, columns, order) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [patches, head_dim] in the order of the windows."""
        m, unit = self.merge, self.merge**2
        inside = torch.arange(m)
        row = torch.arange(rows)[:, None, None, None] * m + inside[None, None, :, None]
        column = torch.arange(columns)[None, :, None, None] * m + inside[None, None, None, :]
        places = torch.stack([x.expand(rows, columns, m, m).reshape(-1) for x in (row, column)], dim=-1)
        places = places.repeat(frames, 1).repeat(images, 1).reshape(-1, unit, 2)[order].reshape(-1, 2)
        return self.visual.rotary_pos_emb(places, places)

    def attend(self, attn, x: torch.Tensor, tables, bounds: torch.Tensor) -> torch.Tensor:
        qkv = attn.qkv(x).reshape(-1, 3, attn.num_heads, attn.head_dim).permute(1, 0, 2, 3)
        query, key, value = qkv.unbind(0)
        query, key = apply_rotary_pos_emb_vision(query, key, *tables)
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        out = torch.onnx.ops.symbolic(
            "::".join(PACKED),
            (query, key, value, bounds),
            {"scale": attn.scaling, "num_heads": attn.num_heads},
            dtype=query.dtype,
            shape=(1, query.shape[2], query.shape[1], query.shape[3]),
            version=1,
        )
        return attn.proj(out.reshape(x.shape[0], -1))

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        visual, unit = self.visual, self.merge**2
        hidden = visual.patch_embed(pixel_values)
        sizes = self.sizes(image_grid_thw)
        order = self.order(*sizes)
        torch._check(order.shape[0] > 0)
        hidden = hidden.reshape(-1, unit, hidden.shape[1])[order].reshape(order.shape[0] * unit, -1)
        tables = self.tables(*sizes, order)
        windows, whole = self.bounds(*sizes)
        for index, block in enumerate(visual.blocks):
            bounds = whole if index in visual.fullatt_block_indexes else windows
            hidden = hidden + self.attend(block.attn, block.norm1(hidden), tables, bounds)
            hidden = hidden + block.mlp(block.norm2(hidden))
        return visual.merger(hidden)[torch.argsort(order)]


def loop(node: onnx.NodeProto, name: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes that do what the packed operator `node` stands for, and the constants they read."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    query, key, value, bounds = node.input
    constants: dict[str, onnx.TensorProto] = {}

    def constant(what: str, numbers, dtype=np.int64) -> str:
        constants[what] = numpy_helper.from_array(np.array(numbers, dtype), f"{name}/{what}")
        return f"{name}/{what}"

    def at(what: str) -> str:
        return f"{name}/{what}"

    def like(what: str, number: str, other: str) -> onnx.NodeProto:
        return helper.make_node("CastLike", [number, other], [at(f"{what}_like")], name=at(f"{what}_like"))

    nodes, flat = [], {}
    for what, tensor in (("query", query), ("key", key), ("value", value)):
        rows, packed = at(f"{what}_rows"), at(f"{what}_packed")
        nodes.append(helper.make_node("Transpose", [tensor], [rows], name=rows, perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [rows, constant("packed_shape", [0, 0, -1])], [packed], name=packed))
        flat[what] = packed
    nodes += [
        helper.make_node("Shape", [at("query_rows")], [at("shape")], name=at("shape")),
        helper.make_node("Size", [bounds], [at("count")], name=at("count")),
        # Olive's script leaves casts in front of its numbers, which ONNX Runtime does not fold.
        like("one", constant("one", 1), at("count")),
        helper.make_node("Sub", [at("count"), at("one_like")], [at("trips")], name=at("trips")),
        # Nothing yet: no row of the values.
        like("zero", constant("zero", [0]), constant("rows_axis", [1])),
        helper.make_node(
            "Slice",
            [flat["value"], at("zero_like"), at("zero_like"), constant("rows_axis", [1])],
            [at("nothing")],
            name=at("nothing"),
        ),
    ]
    body = [
        helper.make_node("Reshape", [at("i"), constant("list", [1])], [at("this")], name=at("this")),
        like("step", constant("one", 1), at("this")),
        helper.make_node("Add", [at("this"), at("step_like")], [at("next")], name=at("next")),
        helper.make_node("Gather", [bounds, at("this")], [at("start")], name=at("start"), axis=0),
        helper.make_node("Gather", [bounds, at("next")], [at("end")], name=at("end"), axis=0),
    ]
    parts = []
    for what in flat:
        part = at(f"{what}_part")
        parts.append(part)
        axis = constant("rows_axis_int32", [1], np.int32)
        body.append(helper.make_node("Slice", [flat[what], at("start"), at("end"), axis], [part], name=part))
    body += [
        helper.make_node(
            "MultiHeadAttention",
            parts,
            [at("attended")],
            name=at("attended"),
            domain="com.microsoft",
            num_heads=given["num_heads"],
            scale=given["scale"],
        ),
        helper.make_node("Concat", [at("so_far"), at("attended")], [at("with_it")], name=at("with_it"), axis=1),
        helper.make_node("Identity", [at("going")], [at("goes_on")], name=at("goes_on")),
    ]
    graph = helper.make_graph(
        body,
        at("body"),
        [
            helper.make_tensor_value_info(at("i"), TensorProto.INT64, []),
            helper.make_tensor_value_info(at("going"), TensorProto.BOOL, []),
            helper.make_tensor_value_info(at("so_far"), TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info(at("goes_on"), TensorProto.BOOL, []),
            helper.make_tensor_value_info(at("with_it"), TensorProto.FLOAT, None),
        ],
    )
    nodes += [
        helper.make_node("Loop", [at("trips"), "", at("nothing")], [at("loop")], name=at("loop"), body=graph),
        helper.make_node("Reshape", [at("loop"), at("shape")], list(node.output), name=at("out")),
    ]
    return nodes, list(constants.values())


def surgery(model: onnx.ModelProto) -> None:
    """Replaces every packed operator by a loop, and x * Reciprocal(y) by x / y, as the recipe does."""
    graph, nodes = model.graph, []
    inverse = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Reciprocal"}
    for node in graph.node:
        if (node.domain, node.op_type) == PACKED:
            new, constants = loop(node, f"attention_{sum(n.op_type == 'Loop' for n in nodes)}")
            nodes += new
            graph.initializer.extend(constants)
        elif node.op_type == "Mul" and any(i in inverse for i in node.input):
            x, y = sorted(node.input, key=inverse.__contains__)
            nodes.append(helper.make_node("Div", [x, inverse[y]], list(node.output), name=node.name))
        elif node.op_type != "Reciprocal":
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [o for o in model.opset_import if o.domain != PACKED[0]]
    del model.opset_import[:]
    model.opset_import.extend([*kept, helper.make_opsetid("com.microsoft", 1)])


def products(model: onnx.ModelProto) -> None:
    """Gemm with weights becomes MatMul and Add, so that a quantiser of MatMul finds it."""
    graph, nodes = model.graph, []
    weights = {t.name: t for t in graph.initializer}
    for node in graph.node:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
        if node.op_type != "Gemm" or not plain or node.input[1] not in weights:
            nodes.append(node)
            continue
        weight = weights[node.input[1]]
        if given.get("transB", 0):
            turned = numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), weight.name)
            weight.CopyFrom(turned)
        product = f"{node.output[0]}/product" if len(node.input) > 2 else node.output[0]
        nodes.append(helper.make_node("MatMul", node.input[:2], [product], name=f"{node.name}/MatMul"))
        if len(node.input) > 2:
            nodes.append(helper.make_node("Add", [product, node.input[2]], list(node.output), name=f"{node.name}/Add"))
    del graph.node[:]
    graph.node.extend(nodes)


def optimised(source: str, target: str, level: ort.GraphOptimizationLevel) -> None:
    """What ONNX Runtime makes of the file `source` at `level`."""
    options = ort.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 3, level
    options.optimized_model_filepath = target
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
