"""A second device without a GPU: tensors that say they are on "standin", and whose
numbers lie in host memory.

    with standin.second_device() as device:
        x = torch.ones(3, device=device)          # x.to(device), x.cpu(), float(x), ...

They refuse what CUDA's tensors refuse: operands on two devices (a CPU number without
dimensions may join elementwise ones), becoming NumPy arrays (by numpy(), np.asarray, in
SciPy or matplotlib), device indices into CPU tensors, a CPU generator for numbers drawn
on the device. Views, in-place operations, out=, linalg, autograd, vmap, forward mode
and modules work. What it cannot show: kernels that CUDA lacks or rounds otherwise,
speed, memory, torch.cuda.*; tensors on it cannot be pickled."""

from contextlib import contextmanager

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "standin"
backend_registration._setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
INDEXING = {
    f"{name}{end}"
    for name in ("index", "index_put", "_index_put_impl", "_unsafe_index")
    for end in ("", "_")
}
# torch.tensor([numbers on the device]) reads them one by one.
_library = torch.library.Library("aten", "IMPL")
_library.impl("_local_scalar_dense", lambda t: t.host.item(), "PrivateUse1")


class OnDevice(torch.Tensor):
    """A tensor on the device; `host` is the CPU tensor that holds its numbers, and
    views share memory as their hosts do.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        like = dict(dtype=host.dtype, device=DEVICE, strides=host.stride())
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, storage_offset=host.storage_offset(), **like
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.host = other.host.detach()

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(
                f"can't convert {DEVICE} device type tensor to numpy."
                " Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return self.detach().cpu().numpy()

    def __array__(self, dtype=None, copy=None):
        return self.numpy()

    def data_ptr(self):
        return self.host.data_ptr()

    def untyped_storage(self):
        return self.host.untyped_storage()

    def tolist(self):
        return self.detach().cpu().tolist()

    def __repr__(self, **_):
        return f"{self.detach().cpu()} on {DEVICE}"

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __reduce_ex__(self, protocol):
        raise NotImplementedError(f"tensors on {NAME} cannot be pickled")


class _Watch(TorchDispatchMode):
    """Sees what has no argument on the device: factories, and copies to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def walk(value, change):
    """Nested lists, tuples and dicts, with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(walk(v, change) for v in value)
    if isinstance(value, dict):
        return {k: walk(v, change) for k, v in value.items()}
    return value


def run(func, args, kwargs):
    """An operation: devices checked as CUDA does, run on the hosts, and what belongs on
    the device wrapped again.
    """
    name, ours, cpu = func._schema.name.partition("::")[2], {}, []

    def host(tensor):
        if isinstance(tensor, OnDevice):
            ours[id(tensor.host)] = tensor
            return tensor.host
        cpu.append(tensor)
        return tensor

    hosts, named = walk(args, host), walk(kwargs, host)
    to = target(name, args, kwargs, ours)
    if ours and cpu and name not in ("_to_copy", "copy_"):
        check(func, name, args, cpu)
    if to == NAME:
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{NAME}' generator but found 'cpu'")
        if kwargs.get("device") is not None:
            named["device"] = torch.device("cpu")
        if name == "_efficientzerotensor":  # zeros without memory, of forward mode
            func = torch.ops.aten.zeros.default
    shapes = [(t, t.shape) for t in ours.values()] if func._schema.is_mutable else ()
    with torch._C._AutoDispatchBelowAutograd():
        out = func(*hosts, **named)
    for tensor, shape in shapes:
        if tensor.host.shape != shape or tensor.host.stride() != tensor.stride():
            tensor.data = OnDevice(tensor.host)  # t_, or an out= that grew
    if to != NAME:
        return out
    return walk(out, lambda t: ours.get(id(t)) if id(t) in ours else wrap(t))


def wrap(tensor):
    return OnDevice(tensor.detach().resolve_conj().resolve_neg())


def target(name, args, kwargs, ours):
    """The type of device that the result is on."""
    if name == "copy_":
        return args[0].device.type
    asked = kwargs.get("device")
    if asked is not None:
        return torch.device(asked).type
    return NAME if ours else "cpu"


def check(func, name, args, cpu):
    """Raise where CUDA does not allow these CPU tensors among those on the device."""
    if name in INDEXING and isinstance(args[0], OnDevice):
        # CPU indices into a tensor on the device are fine
        strangers = [t for t in cpu if not any(t is i for i in args[1])]
        scalars = True
    else:
        written = [
            given
            for given, known in zip(args, func._schema.arguments)
            if known.alias_info and known.alias_info.is_write
        ]
        into = [t for t in cpu if any(t is w for w in written)]
        strangers = into or cpu
        pointwise = torch.Tag.pointwise in func.tags or name.startswith("_foreach")
        scalars = pointwise and not into
    if any(t.dim() or not scalars for t in strangers):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two"
            f" devices, {DEVICE} and cpu, in {name}"
        )


@contextmanager
def second_device():
    """Tensors may be made on the device, and modules moved to it in place, as on CUDA;
    backward runs in this thread, which alone knows the device.
    """
    future, core = torch.__future__, torch._C
    swap = future.get_swap_module_params_on_conversion()
    lift = core._only_lift_cpu_tensors()
    future.set_swap_module_params_on_conversion(True)  # net.to keeps its Parameters
    core._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) moves in sight
    try:
        with torch.autograd.set_multithreading_enabled(False), _Watch():
            yield DEVICE
    finally:
        future.set_swap_module_params_on_conversion(swap)
        core._set_only_lift_cpu_tensors(lift)
