"""Other trainers keep the zeros of a pruned model under ``hold_mask``, and lose them without."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fistapruner as fp
import tiny
from fistapruner.core import parse_sparsity
from fistapruner.errors import FistaPrunerError
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.packed.format import pack_operator
from fistapruner.packed.linear import SparseLinear
from forked import FORKS
from packed.pruned import prune_linears

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda tensors: torch.optim.AdamW(tensors, lr=0.01, weight_decay=0.1),
    "adam with L2": lambda tensors: torch.optim.Adam(tensors, lr=0.01, weight_decay=0.1),
    "sgd": lambda tensors: torch.optim.SGD(tensors, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adafactor": lambda tensors: torch.optim.Adafactor(tensors, lr=0.05),
}


def pruned(architecture: str = "llama", sparsity: str = "50%", seed: int = 0, **changes: Any) -> Any:
    """A model whose decoder layers are pruned."""
    model = tiny.build(architecture, seed=seed, num_hidden_layers=2, **changes)
    prune_linears(model, sparsity)
    return model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach() == 0
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and ".layers." in name
    }


def lost(model: nn.Module, before: dict[str, Tensor]) -> int:
    """Number of zeros that are none any more."""
    after = zeros(model)
    return sum(int((before[name] & ~after[name]).sum()) for name in before)


def tokens(rows: int = 4) -> Tensor:
    return torch.randint(0, tiny.VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(0))


def train(model: Any, make: Callable[..., torch.optim.Optimizer], steps: int = 3) -> None:
    optimizer = make(list(model.parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_keeps_every_zero(optimizer: str, sparsity: str) -> None:
    model, control = pruned(sparsity=sparsity), pruned(sparsity=sparsity)
    before = zeros(model)
    with fp.hold_mask(model) as held:
        train(model, OPTIMIZERS[optimizer])
    assert len(held.operators) == 14
    assert lost(model, before) == 0
    for name, mask in zeros(model).items():
        assert (mask == before[name]).float().mean() > 0.99, name  # survivors are trained, not zeroed
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), control.parameters(), strict=True))
    train(control, OPTIMIZERS[optimizer])
    assert lost(control, before) > 1000


def test_clipping_and_moments_see_survivors_only() -> None:
    """Under the mask, AdamW does what it does on a model that has no gradient at pruned weights at all."""
    model, other = pruned(), pruned()
    with fp.hold_mask(model):
        train(model, OPTIMIZERS["adamw"])
    masks = {name: ~mask for name, mask in zeros(other).items()}
    for name, parameter in other.named_parameters():
        if name in masks:
            parameter.register_hook(lambda gradient, mask=masks[name]: gradient * mask)
    train(other, OPTIMIZERS["adamw"])
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def trainer(
    model: Any, folder: Path, callbacks: list[Any], model_init: Callable[[], Any] | None = None, **settings: Any
) -> transformers.Trainer:
    data = [{"input_ids": row, "labels": row} for row in tokens(16)]
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        **settings,
    )
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks, model_init=model_init)


def test_a_trainer_run_keeps_every_zero_and_without_the_mask_it_does_not(tmp_path: Path) -> None:
    before = zeros(pruned())
    callback, added, context, control = pruned(), pruned(), pruned(), pruned()
    trainer(callback, tmp_path, [fp.hold_mask(callback)]).train()
    late = trainer(added, tmp_path, [])
    late.add_callback(fp.hold_mask(late.model))
    late.train()
    with fp.hold_mask(context):
        trainer(context, tmp_path, []).train()
    trainer(control, tmp_path, []).train()
    assert lost(callback, before) == lost(added, before) == lost(context, before) == 0
    assert lost(control, before) > 1000
    for a, b, c in zip(callback.parameters(), added.parameters(), context.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_trainer_of_another_model_is_refused(tmp_path: Path) -> None:
    run = trainer(None, tmp_path, [fp.hold_mask(pruned())], model_init=lambda: pruned("llama"))
    with pytest.raises(FistaPrunerError, match="trains another LlamaForCausalLM than hold_mask was called with"):
        run.train()
    model = pruned()
    held = fp.hold_mask(model)
    held.on_train_begin(None, None, None, model=nn.DataParallel(torch.compile(model)))
    held.on_train_end(None, None, None)
    held = fp.hold_mask(nn.ModuleDict({"trained": model, "frozen": pruned(seed=1)}))
    held.on_train_begin(None, None, None, model=model)
    held.on_train_end(None, None, None)


def test_a_mask_may_be_held_again() -> None:
    """As by a trainer that is called twice: the second time too, clipping sees survivors only."""
    model = pruned()
    weight = model.model.layers[0].mlp.up_proj.weight
    held = fp.hold_mask(model)
    for _ in range(2):
        model.zero_grad()
        with held:
            model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert weight.grad.any()
        assert not weight.grad[weight == 0].any()


def test_a_model_is_not_kept_alive_by_a_training_that_failed() -> None:
    import weakref

    held = fp.hold_mask(pruned())
    held.on_train_begin(None, None, None)
    gone = weakref.ref(held)
    del held
    assert gone() is None
    train(pruned(seed=1), OPTIMIZERS["sgd"], steps=1)


def test_the_end_names_an_operator_with_lost_zeros() -> None:
    model = pruned()
    weight = model.model.layers[1].mlp.up_proj.weight
    held = fp.hold_mask(model)
    with (
        pytest.raises(
            FistaPrunerError,
            match=r"model\.layers\.1\.mlp\.up_proj\.weight: 3 of its pruned weights .* before the training \(with",
        ),
        held,
    ):
        weight.data[weight == 0] = torch.cat(
            [torch.tensor([1.0, -1.0, -2.0]), torch.zeros(int((weight == 0).sum()) - 3)]
        )
    with torch.no_grad():
        weight[weight == 0] = torch.nan
    held.apply()
    held.verify()
    assert not weight[weight == 0].signbit().any()
    assert not weight.isnan().any()


def test_weights_that_are_replaced_during_the_training_are_held() -> None:
    """As by a trainer that shards the model after ``hold_mask`` has begun."""
    model = pruned()
    projection = model.model.layers[0].mlp.up_proj
    with fp.hold_mask(model):
        projection.weight = nn.Parameter(projection.weight.detach().clone())
        pruned_weights = projection.weight == 0
        train(model, OPTIMIZERS["adamw"], steps=1)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert not bool(projection.weight.grad[pruned_weights].any())  # before clipping


def test_an_error_of_the_training_is_not_hidden_by_the_check() -> None:
    model = pruned()

    def fail() -> None:
        model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"), fp.hold_mask(model):
        fail()


def test_models_without_zeros_or_without_values_are_refused() -> None:
    """The latter is what ``fsdp_cpu_ram_efficient_loading`` leaves on most processes."""
    with pytest.raises(FistaPrunerError, match="no linear weight of LlamaForCausalLM has at least 1% zeros"):
        fp.hold_mask(tiny.build("llama"))
    with pytest.raises(FistaPrunerError, match=r"q_proj\.weight has no values on this process \(meta device\): switch"):
        fp.hold_mask(pruned().to("meta"))


def test_what_is_held() -> None:
    """Not quantised and packed weights, new adapters and heads; transposed weights are."""
    model, linear = pruned(), nn.Linear(8, 8).bfloat16()
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = nn.Parameter(torch.full((768, 1), 119, dtype=torch.uint8), requires_grad=False)
    layer.gate_proj = SparseLinear(pack_operator(linear.weight.detach()))
    layer.adapter = nn.Linear(4, 4)
    layer.adapter.weight.data.zero_()
    model.lm_head.weight.data[:20] = 0.0
    names = fp.hold_mask(model).operators
    assert len(names) == 12
    assert not [name for name in names if "adapter" in name or "head" in name]
    transposed = tiny.build("gpt2", n_layer=1)
    weight = transposed.transformer.h[0].mlp.c_fc.weight
    weight.data *= parse_sparsity("50%").project(weight.data.abs())
    with fp.hold_mask(transposed) as held:
        train(transposed, OPTIMIZERS["adamw"], steps=1)
    assert held.operators == ("transformer.h.0.mlp.c_fc.weight",)
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_a_model_beside_its_frozen_reference_is_held_and_others_are_not() -> None:
    policy, other = pruned(), pruned(seed=1)
    both = nn.ModuleDict({"policy": policy, "reference": pruned(seed=1).requires_grad_(False)})
    held, before, others = fp.hold_mask(both), zeros(policy), zeros(other)
    assert {name for name in held.operators if "policy" in name} == {f"policy.{name}" for name in before}
    with held:
        train(policy, OPTIMIZERS["adamw"])
        train(other, OPTIMIZERS["adamw"], steps=1)
    assert lost(policy, before) == 0
    assert lost(other, others) > 1000


def parallel_training(rank: int, port: int, folder: Path) -> None:
    """One of two processes: train with FSDP2, sharded before or after the masks are taken, and with DDP."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for when in ("mask, shard", "shard, mask", "shard", "replicate, mask", "replicate"):
            model = wrapped = pruned(intermediate_size=49)  # 49 rows do not divide
            held = fp.hold_mask(model) if when == "mask, shard" else None
            if "shard" in when:
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
            else:
                wrapped = DistributedDataParallel(model)
            held = fp.hold_mask(wrapped) if when.endswith(", mask") else held
            with held or nullcontext():
                train(wrapped, OPTIMIZERS["adamw"])
            if when == "mask, shard":
                weight = model.model.layers[1].mlp.up_proj.weight.to_local()
                with torch.no_grad():
                    weight += float(rank == 1)
                with pytest.raises(FistaPrunerError, match="up_proj"):  # on both, though one of them has lost zeros
                    held.verify()
                with torch.no_grad():
                    weight -= float(rank == 1)
                held.apply()
            whole = {
                name: parameter.full_tensor() if "shard" in when else parameter
                for name, parameter in model.named_parameters()
            }
            if rank == 0:
                torch.save(whole, folder / f"{when}.pt")
        dist.barrier()  # a process that ends takes the group's store with it
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_keep_every_zero(tmp_path: Path) -> None:
    port = tiny.free_port()
    both = [FORKS.Process(target=parallel_training, args=(rank, port, tmp_path)) for rank in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(300)
    assert [each.exitcode for each in both] == [0, 0]
    whole = pruned(intermediate_size=49)
    before = zeros(whole)
    with fp.hold_mask(whole):
        train(whole, OPTIMIZERS["adamw"])
    for path in sorted(tmp_path.glob("*.pt")):
        model = pruned(intermediate_size=49)
        model.load_state_dict(torch.load(path), strict=False)
        assert (lost(model, before) == 0) == ("mask" in path.stem), path.stem
        if "mask" in path.stem:
            for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
                assert torch.allclose(a, b, atol=1e-4), (path.stem, name)
    assert len(list(tmp_path.glob("*.pt"))) == 5


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_whole_weights_after_an_evaluation_are_no_lost_zeros(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """As long as the backward pass has not come, FSDP2 keeps what the forward pass has gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    request.addfinalizer(torch.distributed.destroy_process_group)
    model = pruned()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=False)
    with fp.hold_mask(model) as held:
        train(model, OPTIMIZERS["adamw"])
        sharded = model.model.layers[0].mlp.up_proj.weight
        with torch.no_grad():
            model(input_ids=tokens())
            assert model.model.layers[0].mlp.up_proj.weight is not sharded
            sharded.to_local().add_(1.0)  # in one's own part, not in the whole copy
        with pytest.raises(FistaPrunerError, match="up_proj"):
            held.verify()
        model(input_ids=tokens())
        held.apply()
        assert int((sharded.to_local() == 0).sum()) == sharded.numel() // 2
        model(input_ids=tokens())


@pytest.mark.parametrize("hold", [True, False])
def test_accelerate_and_a_gradient_scaler(hold: bool) -> None:
    from accelerate import Accelerator

    model = pruned()
    before = zeros(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1))
    with fp.hold_mask(wrapped) if hold else nullcontext():
        for _ in range(4):
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(input_ids=tokens(), labels=tokens()).loss)
                optimizer.step()
                optimizer.zero_grad()
        plain = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        for factor in (1.0, torch.inf, 1.0):  # the second step is skipped
            plain.zero_grad()
            scaler.scale(model(input_ids=tokens(), labels=tokens()).loss * factor).backward()
            scaler.step(plain)
            scaler.update()
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    assert (lost(model, before) == 0) == hold


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe"])
def test_experts_keep_every_zero_and_saved_files_have_what_the_record_claims(tmp_path: Path, architecture: str) -> None:
    """Experts are tensors of three dimensions in the model, and one by one in most files."""
    pruned_model = tiny.Bench(tmp_path, "50%").pruned(architecture) / "model"
    model, control = (transformers.AutoModelForCausalLM.from_pretrained(pruned_model) for _ in range(2))
    before = {name: parameter == 0 for name, parameter in model.named_parameters()}
    with fp.hold_mask(model) as held:
        train(model, OPTIMIZERS["adamw"])
    experts = {name for name, parameter in model.named_parameters() if parameter.ndim == 3}
    assert experts
    assert experts < set(held.operators)
    for name in held.operators:
        weight = model.get_parameter(name)
        assert int(before[name].sum()) == weight.numel() // 2
        assert torch.equal(weight == 0, before[name]), name
        assert not torch.equal(weight, control.get_parameter(name)), name
    train(control, OPTIMIZERS["adamw"])
    for name, trained in (("held", model), ("lost", control)):
        trained.save_pretrained(tmp_path / name)
        shutil.copy(pruned_model / "fistapruner.json", tmp_path / name)
        found = inspect_checkpoint(tmp_path / name)
        assert bool(found.violations) == (name == "lost")
        assert len(Checkpoint.open(tmp_path / name).names()) == len(Checkpoint.open(pruned_model).names())
