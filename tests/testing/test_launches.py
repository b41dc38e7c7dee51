import torch
import triton
import triton.language as tl

from synchromesh.testing.launches import Launch, Recorder


@triton.jit(do_not_specialize=["number"])
def _double(x, out, number, step, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < number), mask=at < number)


def test_a_launch_is_noted_with_what_it_is_compiled_for_and_not_made():
    recorder, x = Recorder(), torch.empty(48, dtype=torch.bfloat16, device="meta")
    with recorder.recording():
        _double[(2,)](x, torch.empty_like(x), 48, 1, BLOCK=32, num_warps=2)
    (launch,) = recorder.launches
    assert launch == Launch(
        "_double",
        signature=(("x", "*bf16"), ("out", "*bf16"), ("number", "i32"), ("step", "constexpr"), ("BLOCK", "constexpr")),
        constants=(("step", 1), ("BLOCK", 32)),
        divisible=(0, 1),  # number changes from call to call: nothing is taken from it
        options=(("num_warps", 2),),
    )


def test_operations_of_torch_are_counted_where_they_launch_something():
    recorder, x = Recorder(), torch.empty(4, 6, device="meta")
    with recorder.recording():
        (x.t().reshape(3, 8)[:, :2] + 1).view(-1)
        torch.empty(3, device="meta")
    assert recorder.operations == ["clone", "add"]
