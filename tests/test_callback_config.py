"""The settings of the callbacks: what was set is what holds, and what cannot be is named by its field."""

import dataclasses
import inspect
import json
import pickle

import pytest
from tiny.grades import ALWAYS, NEVER, make_model

import grades
from grades import GradEarlyStoppingConfig, GradESConfig, GradESMonitor, VLMGradEarlyStoppingConfig
from training.arguments import as_flags

CONFIGS = [GradESConfig, GradEarlyStoppingConfig, VLMGradEarlyStoppingConfig]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tau": None}, "tau None: must be a number > 0 or auto"),
        ({"tau": "x"}, "tau 'x': must be a number > 0 or auto"),
        ({"tau": True}, "tau True: must be a number > 0 or auto"),
        ({"alpha": "0.3"}, "alpha '0.3': must be a number in [0, 1)"),
        ({"alpha": None}, "alpha None: must be a number in [0, 1)"),
        ({"alpha": float("nan")}, "alpha nan: must be in [0, 1)"),
        ({"compute_interval": 2.5}, "compute_interval 2.5: must be a whole number >= 1"),
        ({"compute_interval": True}, "compute_interval True: must be a whole number >= 1"),
        ({"compute_interval": [5]}, "compute_interval [5]: must be a whole number >= 1"),
        (
            {"target_components": "q_proj"},
            "target_components 'q_proj': must be a list of text (did you mean ['q_proj']?)",
        ),
        ({"target_components": [1]}, "target_components [1]: must be a list of text"),
        ({"freeze_vision": "false"}, "freeze_vision 'false': must be True or False"),
        ({"freeze_prefix": 0}, "freeze_prefix 0: must be True or False"),
        ({"metric": None}, "metric None: must be one of"),
        ({"metric": "weight_chang"}, "(did you mean weight_change?)"),
        ({"vision_mlp_tau": "auto"}, "vision_mlp_tau 'auto': must be a number > 0 or None"),
        ({"output_dir": 3}, "output_dir 3: must be text or None"),
        ({"replay_seed": 0.5}, "replay_seed 0.5: must be a whole number"),
        ({"average_weights": 1}, "average_weights 1: must be in (0, 1)"),
        ({"freeze_order": "front", "freeze_vision": False}, "freeze_order front: must be another than front where"),
    ],
)
def test_each_setting_is_checked_by_type_and_named_as_a_field(given, said):
    (problem,) = GradEarlyStoppingConfig(**given).problems()
    assert said in problem
    assert not problem.startswith("--")
    changed = GradEarlyStoppingConfig()
    for name, value in given.items():
        setattr(changed, name, value)
    assert changed.problems() == [problem]


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_setting_of_any_type_but_its_own_passes_or_crashes(kind):
    for field in dataclasses.fields(kind):
        for odd in (object(), b"x", {"a": 1}, [None], 1j):
            if field.name == "taus" and isinstance(odd, dict):
                continue  # what it takes
            (problem,) = kind(**{field.name: odd}).problems()
            assert problem.startswith(f"{field.name} "), problem


def test_problems_name_flags_where_they_come_from_the_command_line():
    config = GradESConfig(alpha=2.0, unfreeze_factor=2.0)
    assert [line.split()[0] for line in config.problems("--")] == ["--alpha", "--unfreeze_factor"]
    assert not any("--" in line for line in config.problems())
    library = "alpha 0.0: the grace period is short\nmetric x: no\nno such thing: here"
    assert as_flags(library).splitlines() == [
        "--alpha 0.0: the grace period is short", "--metric x: no", "no such thing: here"
    ]  # fmt: skip


def test_numbers_of_numpy_and_tuples_are_taken_as_what_they_are():
    np = pytest.importorskip("numpy")
    config = VLMGradEarlyStoppingConfig(
        alpha=np.float64(0.28), vision_tau=np.float32(0.5), compute_interval=np.int64(3), target_components=("q_proj",)
    )
    assert not config.problems()
    assert json.loads(json.dumps(dataclasses.asdict(config))) == dataclasses.asdict(config)
    assert (repr(config.alpha), config.compute_interval, config.target_components) == ("0.28", 3, ["q_proj"])


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        # As in the dataclasses of the package grades 1.0.6.
        (
            GradEarlyStoppingConfig,
            "tau alpha max_frozen_ratio compute_interval target_components auto_detect_mode use_cuda_acceleration "
            "save_freezing_history enable_wandb_logging output_dir",
        ),
        (
            VLMGradEarlyStoppingConfig,
            "vision_tau language_tau alpha max_frozen_ratio compute_interval freeze_vision freeze_language "
            "auto_detect_mode use_cuda_acceleration save_freezing_history enable_wandb_logging output_dir",
        ),
    ],
)
def test_settings_by_place_are_in_the_authors_order(kind, order):
    names = order.split()
    values = dict(zip(names, ["auto", 0.5, 0.7, 0.25, 3, True, False, True, True, False, True, "x"], strict=False))
    assert kind(*values.values()) == kind(**values)
    by_place = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_place == names
    with pytest.raises(TypeError, match="by name"):
        kind(*values.values(), *range(9))
    with pytest.raises(TypeError, match=f"{names[0]} given by place and by name"):
        kind(0.1, **{names[0]: 0.2})


def test_what_cannot_be_set_is_an_error_at_once():
    with pytest.raises(TypeError, match="positional"):
        GradESConfig(0.3)
    with pytest.raises(TypeError, match="did you mean compute_interval"):
        GradEarlyStoppingConfig(compute_intervall=3)
    config = GradEarlyStoppingConfig()
    with pytest.raises(AttributeError, match="did you mean alpha"):
        config.alhpa = 0.5
    for act in (lambda: GradEarlyStoppingConfig(vision_tau=1.0), lambda: setattr(config, "language_tau", 1.0)):
        with pytest.raises((TypeError, AttributeError), match="one tau for all components"):
            act()


@pytest.mark.parametrize("kind", CONFIGS)
def test_settings_survive_asdict_replace_and_pickle(kind):
    given = {"alpha": 0.5, "target_components": ["q_proj"]}
    given |= {"tau": 0.02} if kind is GradEarlyStoppingConfig else {"vision_tau": 0.02, "language_tau": "auto"}
    config = kind(**given)
    assert kind(**dataclasses.asdict(config)) == config
    assert kind(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert dataclasses.replace(config) == pickle.loads(pickle.dumps(config)) == config
    changed = dataclasses.replace(config, **{next(reversed(given)): 3.0})
    assert changed.tau_of("language", "mlp") == 3.0
    config.alpha = 0.1
    assert changed.alpha == 0.5


def test_a_monitor_works_with_settings_that_refuse_changes():
    config = GradESConfig(alpha=0)
    monitor = GradESMonitor(config, make_model(), None, 4)
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"compute_interval: .* during a run"):
        monitor.config.compute_interval = 5
    config.compute_interval = 5  # of the next run
    assert monitor.config.compute_interval == 1
    free = dataclasses.replace(monitor.config, compute_interval=7)
    free.alpha = 0.5


def test_the_schedule_is_the_trainers(hf):
    with pytest.raises(ValueError, match="on_converged cooldown: must be stop"):
        grades.GradEarlyStoppingCallback({"on_converged": "cooldown"})


def test_what_is_set_on_the_callback_before_training_holds_and_during_it_is_refused(hf, tmp_path):
    config = hf.settings()
    callback = grades.GradEarlyStoppingCallback(config)
    assert callback.config is config
    refused = []

    class Sets(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for name, value in (("compute_interval", 3), ("config", hf.settings())):
                with pytest.raises(AttributeError):
                    setattr(callback.config if name != "config" else callback, name, value)
                refused.append(name)

    given = hf.TrainingArguments(**hf.arguments(tmp_path, max_steps=6))
    trainer = hf.Trainer(model=hf.llama(), args=given, train_dataset=hf.rows(), callbacks=[callback, Sets()])
    callback.config.language_attention_tau = None
    callback.config.tau = NEVER
    config.alpha = 0.5
    trainer.train()
    assert set(refused) == {"compute_interval", "config"}
    assert {component["tau"] for component in callback.monitor.history()["components"]} == {NEVER}
    assert callback.monitor.grace_steps == 3
    assert not callback.monitor.frozen
    callback.config.tau = ALWAYS  # of the next training
    callback.config.language_mlp_tau = None
    trainer.train()
    assert len(callback.monitor.frozen) == hf.MATRICES
    callback.config.tau = None
    with pytest.raises(ValueError, match="tau None: must be a number"):
        trainer.train()


def test_what_is_no_configuration_is_an_error(hf):
    for odd in (0.02, "auto", GradEarlyStoppingConfig, grades.presets):
        with pytest.raises(TypeError, match=r"config|no setting"):
            grades.GradEarlyStoppingCallback(odd)
    with pytest.raises(ValueError, match=r"^alpha 1:"):
        grades.GradEarlyStoppingCallback({"alpha": 1})
    with pytest.raises(ValueError, match=r"^vision_tau None:"):
        grades.VLMGradEarlyStoppingCallback(GradESConfig(vision_tau=None))


def test_a_tau_is_named_by_the_setting_that_holds_it():
    of_two, of_one = (kind(taus={"audio": "auto"}) for kind in (VLMGradEarlyStoppingConfig, GradEarlyStoppingConfig))
    assert [config.tau_name("audio") for config in (of_two, of_one)] == ["taus", "taus"]
    assert [config.tau_name("language") for config in (of_two, of_one)] == ["language_tau", "tau"]


def test_presets_are_the_papers_tables():
    table_9 = {
        "qwen3-14b": (6.387926, 0.025181), "phi4-14b": (3.512882, 0.025181), "qwen3-0.6b": (1.804456, 0.001183),
        "llama-3.1-8b": (2.404167, 0.021637), "mistral-7b": (2.726866, 0.029591),
    }  # fmt: skip
    expected = {
        f"{model}/{method}": (tau, tau, 0.55, 1)
        for model, taus in table_9.items()
        for method, tau in zip(("full", "lora"), taus, strict=True)
    } | {
        "qwen2.5-vl-7b/lora": (3.3, 33.0, 0.30, 1), "qwen2.5-vl-7b/full-4bit": (0.13, 0.09, 0.30, 1),
        "nanovlm": (0.30, 6.00, 0.28, 20), "nanovlm-alt": (6.30, 3.90, 0.28, 20),
    }  # fmt: skip
    assert len(grades.presets) == len(expected)
    for name, config in grades.presets.items():
        assert (config.vision_tau, config.language_tau, config.alpha, config.compute_interval) == expected[name]
        assert config.metric == "weight_change"
        assert not config.problems()
    with pytest.raises(KeyError, match=r"qwen3-0\.6b/lora"):
        grades.presets["qwen3-0.6b"]
