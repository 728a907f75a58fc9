"""Tables written to memory in compiled operations, and nowhere else."""

import pytest
import timm
import torch

import visionpos as vp
from visionpos.materialize import _is_exporting, _materialize, materialize

OPERATION = "visionpos.materialize.default"


def graph_of(function, *args):
    """The operations that dynamo hands to a compiler, and the compiled function's result."""
    operations = []

    def backend(module, inputs):
        operations.extend(str(node.target) for node in module.graph.nodes)
        return module

    torch._dynamo.reset()
    result = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)
    return operations, result


def test_eagerly_the_tensor_itself():
    x = torch.randn(3)
    assert materialize(x) is x


@pytest.mark.unhooked
def test_the_operation():
    """Schema, fake tensors and gradients of the operation, by torch's own checks."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(_materialize, (x.mT,))
    assert torch.equal(_materialize(x), x)
    assert torch.autograd.gradcheck(_materialize, (x,))
    assert torch.autograd.gradgradcheck(_materialize, (x,))
    assert torch.equal(torch.func.vmap(_materialize, in_dims=1, out_dims=1)(x), x)


@pytest.mark.unhooked
@pytest.mark.parametrize("training", [False, True])
def test_windows_and_kept_tokens_use_it_when_compiled(training):
    torch.manual_seed(0)
    options = {"img_size": (16, 24), "embed_dim": 16, "depths": (1,), "num_heads": (2,), "window_size": (2, 3)}
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **options)
    swin = vp.set_encoding(swin, "relative_table").train(training)
    x = torch.randn(1, 3, 16, 24)
    operations, out = graph_of(swin, x)
    assert OPERATION in operations
    assert torch.equal(out, swin(x))

    rope = vp.create_encoding("rope_mixed", num_heads=2, head_dim=8)
    index = torch.stack([torch.randperm(15)[:9] for _ in range(3)])
    prepare = lambda index: rope.take_tokens(rope.prepare(vp.Positions.grid((3, 5))), index, 0)  # noqa: E731
    operations, table = graph_of(prepare, index)
    assert OPERATION in operations
    assert torch.equal(table, prepare(index))


@pytest.mark.unhooked
def test_exported_programs_do_not_need_it():
    class Table(torch.nn.Module):
        def forward(self, x):
            return materialize(2 * x)

    program = torch.export.export(Table(), (torch.ones(3),))
    assert "materialize" not in str(program.graph)
    assert program.module()(torch.ones(3)).tolist() == [2, 2, 2]


def test_whether_a_graph_is_exported_is_marked_as_the_compiler_marks_a_constant():
    marked = torch.compiler.assume_constant_result(lambda: True)
    assert vars(marked)
    assert vars(marked).items() <= vars(_is_exporting).items()
