"""Sessions inside of training loops that others wrote: transformers' Trainer and Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optkit.training_session import TrainingSession

# Beside the checkpoint of the Trainer.
_FILE = "optkit.pt"


def trainer_callback(session: TrainingSession) -> Any:
    """A callback for ``transformers.Trainer``: steps are counted, the loss in the model's outputs becomes the session's.

        session = optkit.training(model, recipe, example=dict(batch), steps=total)
        Trainer(model, arguments, train_dataset=data, callbacks=[optkit.trainer_callback(session)]).train()
        session.finish().compile(target="cpu")

    The model must give its loss, as models of transformers do when they are given labels. What the passes keep is saved
    beside each checkpoint, and taken back where training resumes from it.
    """
    import torch
    from transformers import TrainerCallback

    from optkit.errors import UsageError

    class SessionCallback(TrainerCallback):
        """A session at work in a Trainer."""

        _handles: tuple[Any, ...] = ()

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Follow the optimizer, and take back what a checkpoint holds."""
            missing = _missing(session, given["optimizer"])
            if missing:
                raise UsageError(
                    f"the Trainer's optimizer does not train {missing} parameters that passes added outside of the model",
                    hint="give optimizers=(torch.optim.AdamW(session.groups(0.01)), None) to the Trainer",
                )
            hook = session.module.register_forward_hook(_with_session_loss(session), with_kwargs=True)
            self._handles = (hook, session.follow(_inner(given["optimizer"])))
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
            if state.global_step and saved.is_file():
                session.load_state_dict(torch.load(saved, weights_only=True))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Beside the checkpoint."""
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                torch.save(session.state_dict(), folder / _FILE)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Let go."""
            for handle in self._handles:
                handle.remove()

    return SessionCallback()


def lightning_callback(session: TrainingSession) -> Any:
    """A callback for Lightning's ``Trainer``: steps are counted, and what the passes keep is part of checkpoints.

    ``training_step`` adds the passes' loss itself, ``session.loss(loss, (x,), outputs)``, and ``configure_optimizers`` takes
    ``session.parameters()``.
    """
    from lightning.pytorch import Callback

    from optkit.errors import UsageError

    class SessionCallback(Callback):
        """A session at work in Lightning."""

        _handles: tuple[Any, ...] = ()

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Follow the optimizer."""
            if len(trainer.optimizers) != 1:
                raise UsageError(f"a session follows one optimizer, and there are {len(trainer.optimizers)}")
            if missing := _missing(session, trainer.optimizers[0]):
                raise UsageError(
                    f"the optimizer does not train {missing} parameters of the session",
                    hint="make it of session.parameters() in configure_optimizers",
                )
            self._handles = (session.follow(_inner(trainer.optimizers[0])),)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            """Let go."""
            for handle in self._handles:
                handle.remove()

        def state_dict(self) -> dict[str, Any]:
            """Part of Lightning's checkpoint."""
            return session.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Where training resumes."""
            session.load_state_dict(state_dict)

    return SessionCallback()


def _inner(optimizer: Any) -> Any:
    """The optimizer of torch inside of what accelerate or Lightning put around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _missing(session: TrainingSession, optimizer: Any) -> int:
    held = {id(p) for group in _inner(optimizer).param_groups for p in group["params"]}
    return sum(id(p) not in held for p in session.parameters())


def _with_session_loss(session: TrainingSession) -> Any:
    """A forward hook; it sees what the model was called with, whatever wraps it."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Any) -> Any:
        if not module.training:
            return None
        if not isinstance(outputs, Mapping) or outputs.get("loss") is None:
            from optkit.errors import UsageError

            raise UsageError(
                f"{type(module).__name__} gives no loss",
                hint="give labels, or write the loop yourself: session.loss",
            )
        outputs["loss"] = session.loss(outputs["loss"], args or kwargs, outputs)  # type: ignore[index]
        return outputs

    return hook
