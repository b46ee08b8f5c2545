"""Sessions inside of the Trainer of transformers and of Lightning, held against the same training written by hand."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import optkit
from optkit.errors import UsageError

GRADUAL = {"recipe": 1, "passes": [{"prune-weights": {"sparsity": 0.5, "end": 0.5, "every": 1}}]}
DISTIL = {"recipe": 1, "passes": [{"distil": {"weight": 0.5}}, *GRADUAL["passes"]]}
# Whatever these packages warn of in each other.
pytestmark = pytest.mark.filterwarnings("ignore")


def _by_hand(module, recipe, batches, loss, rate):
    session = optkit.training(module, recipe, example=batches[0], steps=len(batches))
    optimizer = torch.optim.SGD(session.parameters(), lr=rate)
    module.train()
    for batch in batches:
        outputs = module(**batch)
        session.loss(loss(outputs, batch), batch, outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()
    return session.finish().module


@pytest.fixture
def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _rows(n=16):
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 50, (n, 8), generator=random)
    return [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": r[0] % 3} for r in rows]


def _trainer(model, folder, session, resume=False, steps=-1, **more):
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return None

    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, save_steps=3, report_to=[], disable_tqdm=True, use_cpu=True,
        max_steps=steps,
    )  # fmt: skip
    trainer = InOrder(
        model, arguments, train_dataset=_rows(), callbacks=[optkit.trainer_callback(session)], **more
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _example():
    rows = _rows()
    return [{k: torch.stack([r[k] for r in rows[i : i + 4]]) for k in rows[0]} for i in range(0, 16, 4)]


@pytest.mark.needs("transformers", "accelerate")
@pytest.mark.parametrize("recipe", [GRADUAL, DISTIL], ids=["gradual", "distil"])
def test_the_trainer_of_transformers_trains_as_a_loop_by_hand(bert, tmp_path, recipe):
    batches = _example()
    twin = copy.deepcopy(bert)
    inputs = {k: v for k, v in batches[0].items() if k != "labels"}
    expected = _by_hand(twin, recipe, [*batches, *batches], lambda outputs, _: outputs.loss, 0.1)
    session = optkit.training(bert, recipe, example=batches[0], steps=8)
    _trainer(bert, tmp_path, session)
    assert session.steps == 8
    done = session.finish().module
    with torch.no_grad():
        torch.testing.assert_close(done(**inputs).logits, expected(**inputs).logits, rtol=1e-3, atol=1e-4)
    assert float((done.bert.pooler.dense.weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)
    assert not bert._forward_hooks


@pytest.mark.needs("transformers", "accelerate")
def test_the_trainer_resumes_with_the_state_of_the_passes(bert, tmp_path):
    twin, batch = copy.deepcopy(bert), _example()[0]
    session = optkit.training(bert, GRADUAL, example=batch, steps=8)
    _trainer(bert, tmp_path, session)
    whole = session.finish().module.state_dict()
    other = optkit.training(twin, GRADUAL, example=batch, steps=8)
    _trainer(twin, tmp_path, other, resume=str(tmp_path / "checkpoint-3"))
    assert other.steps == 8
    for name, value in other.finish().module.state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.needs("transformers", "accelerate")
def test_an_optimizer_that_leaves_parameters_out_is_refused(bert, tmp_path):
    recipe = {"recipe": 1, "passes": [{"distil-features": {"layers": ["classifier=bert.pooler.dense"]}}]}
    session = optkit.training(bert, recipe, example=_example()[0], steps=8)
    with pytest.raises(UsageError, match="does not train 1 parameters") as caught:
        _trainer(bert, tmp_path, session)
    assert "session.groups" in str(caught.value.hint)
    optimizer = torch.optim.SGD(session.parameters(), lr=0.1)
    _trainer(bert, tmp_path, session, optimizers=(optimizer, None), steps=2)
    assert session.steps == 2


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def _lightning(session, folder, checkpoint=None, left_out=False, epochs=2):
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = session.module

        def training_step(self, batch, _):
            x, y = batch
            outputs = self.net(x)
            return session.loss(F.cross_entropy(outputs, y), (x,), outputs)

        def configure_optimizers(self):
            return torch.optim.SGD(session.parameters()[: 1 if left_out else None], lr=0.1)

    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[optkit.lightning_callback(session)],
    )  # fmt: skip
    trainer.fit(Module(), loader, ckpt_path=checkpoint)
    return trainer, [{"x": x[i : i + 4], "y": (x[i : i + 4, 0] > 0).long()} for i in range(0, 16, 4)]


@pytest.mark.needs("lightning")
def test_lightning_trains_as_a_loop_by_hand_and_resumes(tmp_path):
    torch.manual_seed(0)
    module = _Net()
    first, twin, third = (copy.deepcopy(module) for _ in range(3))
    x = torch.zeros(4, 8)
    session = optkit.training(first, DISTIL, example=x, steps=8)
    _, batches = _lightning(session, tmp_path)
    assert session.steps == 8
    reference = optkit.training(twin, DISTIL, example=x, steps=8)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batch in [*batches, *batches]:
        outputs = twin(batch["x"])
        reference.loss(F.cross_entropy(outputs, batch["y"]), (batch["x"],), outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    expected = reference.finish().module.state_dict()
    done = session.finish().module.state_dict()
    half = optkit.training(copy.deepcopy(module), DISTIL, example=x, steps=8)
    trainer, _ = _lightning(half, tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = optkit.training(third, DISTIL, example=x, steps=8)
    _lightning(again, tmp_path, checkpoint=tmp_path / "half.ckpt")
    assert again.steps == 8
    resumed = again.finish().module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(done[name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.needs("lightning")
def test_lightning_with_an_optimizer_that_leaves_parameters_out_is_refused(tmp_path):
    session = optkit.training(_Net(), GRADUAL, example=torch.zeros(4, 8), steps=8)
    with pytest.raises(UsageError, match="does not train 3 parameters of the session"):
        _lightning(session, tmp_path, left_out=True)


@pytest.mark.parametrize("name", ["trainer_callback", "lightning_callback"])
def test_callbacks_are_there_without_the_packages(name):
    assert callable(getattr(optkit, name))
    assert importlib.util.find_spec("optkit.training_callbacks") is not None
