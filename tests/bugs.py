"""What the tests of known bugs share: small hosts, and a bug put back for the length of a block."""

import contextlib
import datetime

import pytest
import torch

import visionpos as vp
from tests import small
from tests.small import pictures
from visionpos.frequencies import geometric_frequencies, to_float64
from visionpos.rotary.rope_axial import RopeAxial
from visionpos.rotation import mixed_angles

ENCODINGS = [name for name in vp.list_encodings() if name != "none"]
SIZE = (32, 48)


@contextlib.contextmanager
def put_back(owner, notices=AssertionError, **wrong):
    """Inside the block attributes of `owner` are wrong again, and a check must notice it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in wrong.items():
            patch.setattr(owner, name, value)
        with pytest.raises(notices):
            yield


def vit(**options):
    """A ViT with one block, in which all patches count in the end."""
    return small.vit(**{"depth": 1, "global_pool": "avg", **options})


RIGHT_INIT = RopeAxial.__init__


def with_buffer(self, *args, **options):
    """RoPE's constructor, with the frequencies in a buffer."""
    RIGHT_INIT(self, *args, **options)
    self.register_buffer("theta", geometric_frequencies(4, self.temperature).float(), persistent=False)


def from_buffer(self, positions):
    """RoPE's angles from that buffer."""
    return (to_float64(positions.coords)[..., None] * to_float64(self.theta)).flip(-2).flatten(-2).unsqueeze(-3)


def cached_tensor(self, positions):
    """What RoPE-Mixed computes, and keeps."""
    if "cache" not in self.__dict__:
        self.__dict__["cache"] = mixed_angles(positions.coords, self.freqs)
    return self.__dict__["cache"]


PARALLEL_SIZES = (SIZE, (40, 24))


def parallel_model():
    """Encodings with and without parameters and buffers, at every place of attention."""
    return vp.set_encoding(vit(dynamic_img_size=True), "learned+rope_mixed+rope_axial+relative_table").train()


def loss_of(model, size):
    """A loss of pictures of that size."""
    return torch.nn.functional.cross_entropy(model(pictures(size)), torch.tensor([1, 3]))


def descend(model):
    """One step of plain gradient descent."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None


def train_in_parallel(rank, folder, with_bug):
    """One of two processes: ten steps at a size of its own; the bug is a buffer that has the size of the picture."""
    if with_bug:
        table = vp.registry.get_encoding_class("relative_table")
        right = table.encode

        def follows_the_picture(self, queries, keys):
            self.relative_position_index = vp.relative_position_index(queries.feat_shape)
            return right(self, queries, keys)

        table.encode = follows_the_picture
    timeout = datetime.timedelta(seconds=60)
    store = f"file://{folder}/store-{with_bug}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    model = parallel_model()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(10):
        loss_of(parallel, PARALLEL_SIZES[rank]).backward()
        descend(model)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
