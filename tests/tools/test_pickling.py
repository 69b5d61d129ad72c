"""Saving, copying and sending patched models."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from hess_plugin import PatchError, patch
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.interception import is_patched

Run = Callable[[nn.Module, Tensor], Tensor]
SENTENCE = r"cannot be pickled .*: take model\.state_dict\(\).*, or call remove\(\) on its patch first"


def _send_tokens(model: nn.Module, images: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(images)["depth"].double().sum().item())


def test_a_patched_model_and_a_patched_part_refuse_to_be_pickled_in_a_sentence(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model, x = make_model(), images()
    plain = outputs(model, x)
    handle = patch(model, **small_blocks)
    wanted = outputs(model, x)
    block = model.aggregator.global_blocks[0]
    for part in (model, model.aggregator, block, block.attn):
        for save in (pickle.dumps, lambda saved: torch.save(saved, io.BytesIO())):
            with pytest.raises(PatchError, match=SENTENCE) as caught:
                save(part)
            assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    pickle.dumps(model.depth_head)  # not patched, not refused
    assert torch.equal(outputs(model, x), wanted)
    handle.remove()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(outputs(torch.load(file, weights_only=False), x), plain)


def test_the_state_of_a_patched_model_is_that_of_the_unpatched_one(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model, x = make_model(), images()
    names, plain = list(model.state_dict()), outputs(model, x)
    patch(model, **small_blocks)
    wanted = outputs(model, x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert list(state) == names
    other = make_model(seed=1)
    other.load_state_dict(state)
    assert torch.equal(outputs(other, x), plain)
    patched_before_loading = make_model(seed=1)
    patch(patched_before_loading, **small_blocks)
    patched_before_loading.load_state_dict(state)
    assert torch.equal(outputs(patched_before_loading, x), wanted)


def test_a_copy_is_patched_runs_its_own_weights_and_refuses_pickling_too(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model, x = make_model(), images()
    patch(model, **small_blocks)
    wanted = outputs(model, x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.aggregator.global_blocks[0].attn.qkv.weight.zero_()
    assert is_patched(twin) and torch.equal(outputs(twin, x), wanted) and not torch.equal(outputs(model, x), wanted)
    with pytest.raises(PatchError, match=SENTENCE):
        pickle.dumps(twin)


def test_a_spawned_process_is_refused_a_patched_model_and_a_forked_one_runs_it(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model, x = make_model(), images()
    patch(model, **small_blocks)
    with torch.no_grad():
        wanted = model(x)["depth"].double().sum().item()
    spawn = mp.get_context("spawn")
    with pytest.raises(PatchError, match=SENTENCE):
        spawn.Process(target=_send_tokens, args=(model, x, None)).start()
    fork = mp.get_context("fork")
    queue = fork.SimpleQueue()
    child = fork.Process(target=_send_tokens, args=(model, x, queue))
    child.start()
    assert queue.get() == wanted
    child.join()
    assert child.exitcode == 0
    queue.close()
