"""The sharpness-aware fields of a run's arguments: read, checked, kept, and refused where they cannot work."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import typing
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from accelerate.utils import DistributedType

import samopt
from samopt.integrations.transformers import (
    SAMArguments,
    SAMTrainer,
    SAMTrainerMixin,
    SAMTrainingArguments,
    make_sharpness_aware,
)
from samopt.trust_region import EMA, InputNoise
from tests.helpers import hf

pytestmark = pytest.mark.hf

CHOSEN = {
    "sam": "tram",
    "sam_trust_region": "ema",
    "sam_ema_decay": 0.9,
    "sam_scale": 2.0,
    "sam_every": 2,
    "sam_sync_perturbation": True,
    "sam_stochastic_rounding": False,
}


def parsed(source, tmp_path):
    parser = transformers.HfArgumentParser(SAMTrainingArguments)
    options = {"output_dir": str(tmp_path), **CHOSEN}
    if source == "command line":
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        return parser.parse_args_into_dataclasses(words)[0]
    file = tmp_path / f"arguments.{source}"
    file.write_text({"json": json.dumps, "yaml": yaml.safe_dump}[source](options))
    return getattr(parser, f"parse_{source}_file")(str(file))[0]


@pytest.mark.parametrize("source", ["command line", "json", "yaml"])
def test_arguments_are_parsed(source, tmp_path):
    arguments = parsed(source, tmp_path)
    assert {name: getattr(arguments, name) for name in CHOSEN} == CHOSEN
    assert arguments.sam_rho is None


def test_a_number_without_a_point_in_yaml_is_a_number(tmp_path):
    file = tmp_path / "arguments.yaml"
    file.write_text(f"output_dir: {tmp_path}\nsam: asam\nsam_rho: 5e-1\nsam_eta: 1e-2\n")
    assert yaml.safe_load(file.read_text())["sam_rho"] == "5e-1"
    (arguments,) = transformers.HfArgumentParser(SAMTrainingArguments).parse_yaml_file(str(file))
    assert (arguments.sam_rho, arguments.sam_eta) == (0.5, 0.01)


def test_the_command_line_lists_the_choices(capsys):
    parser = transformers.HfArgumentParser(SAMTrainingArguments)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", "x", "--sam", "sams"])
    message = capsys.readouterr().err.rpartition("--sam: invalid choice: 'sams'")[2]
    assert all(name in message for name in ("none", *samopt.available()))


def test_arguments_are_kept_with_the_run(tmp_path):
    trainer = hf.make_trainer(
        tmp_path, hf.norms(), hf.points(8), sam="asam", sam_rho=0.2, save_strategy="epoch", num_train_epochs=1
    )
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert (type(saved), saved.sam, saved.sam_rho) == (SAMTrainingArguments, "asam", 0.2)
    assert json.loads(saved.to_json_string())["sam_rho"] == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sam": "SAM"}, f"sam must be one of none, {', '.join(samopt.available())}, got 'SAM'"),
        ({"sam": "sam", "sam_norm": "l1"}, "sam_norm must be one of l2, linf, got 'l1'"),
        ({"sam": "tram", "sam_divergence": "js"}, "sam_divergence must be one of kl, .*, got 'js'"),
        ({"sam": "sam", "sam_rho": -0.1}, "sam_rho must be >= 0 and finite, got -0.1; leave it out"),
        ({"sam": "sam", "sam_rho": float("nan")}, "sam_rho must be >= 0 and finite, got nan"),
        ({"sam": "sam", "sam_rho": "large"}, "sam_rho must be a number, got 'large'; leave it out for the default"),
        ({"sam": "asam", "sam_eta": -1.0}, "sam_eta must be >= 0"),
        ({"sam": "tram", "sam_max_radius": 0.0}, "sam_max_radius must be > 0, got 0.0"),
        ({"sam": "sam", "sam_late": "first 10 %"}, 'sam_late must be a share .* "last 25 %" or 0.25; got .first 10 %'),
        ({"sam": "sam", "sam_late": 25}, "sam_late must be a share of the run, above 0 and up to 1 .* got 25"),
        ({"sam": "sam", "sam_late": 0.0}, "sam_late must be a share of the run"),
        ({"sam": "sam", "sam_every": 0}, "sam_every must be at least 1, got 0"),
        ({"sam": "sam", "sam_eta": 0.1}, 'sam_eta=0.1 has no effect with sam="sam"; leave it out, or use asam or'),
        ({"sam": "tram", "sam_rho": 0.1}, 'sam_rho=0.1 has no effect with sam="tram"'),
        ({"sam": "asam", "sam_trust_region": "ema"}, "sam_trust_region='ema' has no effect .* use tram"),
        ({"sam": "tram", "sam_direction": "momentum"}, 'sam_direction="momentum" takes one pass, and sam="tram"'),
        ({"sam": "tram", "sam_ema_decay": 0.9}, 'sam_ema_decay=0.9 has no effect without .*sam_trust_region="ema"'),
        ({"sam": "tram", "sam_trust_region": "ema", "sam_ema_decay": 1.5}, "decay must be between 0 and 1, got 1.5"),
        ({"sam": "tram", "sam_trust_region": "input_noise", "sam_noise_std": 0.0}, "std must be > 0"),
        ({"sam": "functional-sam", "sam_direction": "momentum"}, "combines the gradients of two passes"),
        ({"sam": "gsam", "sam_direction": "momentum"}, "combines the gradients of two passes"),
        ({"sam": "momentum-sam", "sam_direction": "momentum-uphill"}, "sam_direction='momentum-uphill' has no effect"),
        ({"sam": "le-sam", "sam_norm": "linf"}, "sam_norm='linf' has no effect with sam=\"le-sam\""),
        ({"sam": "gsam", "sam_options": {"gamma": 0.1}}, 'variant "gsam" takes no gamma: its options are .*wsam would'),
        ({"sam": "gsam", "sam_options": '{"gamma": 0.1}'}, 'variant "gsam" takes no gamma'),
        ({"sam": "gsam", "sam_options": "alpha=0.1"}, "sam_options must be a dict or its JSON.*got 'alpha=0.1'"),
        ({"sam": "gsam", "sam_options": "[1]"}, "sam_options must be a dict or its JSON"),
        ({"sam": "gsam", "sam_options": {"alpha": -1.0}}, "alpha must be"),
        ({"sam": "sam", "sam_rho": 0.1, "sam_options": {"rho": 0.2}}, "sam_options has rho, and sam_rho sets it too"),
        ({"sam": "sam", "sam_options": {"seed": 1}}, "sam_options cannot set seed"),
        ({"sam": "sam", "sam_only": "("}, r"only='\(' is no valid regular expression"),
        ({"sam": "sam", "sam_only": ""}, "only='' is found in every name"),
        ({"sam": "sam", "sam_only": "norm", "sam_options": {"only": "bias"}}, "sam_options has only, and sam_only"),
        ({"sam": "sam", "sam_rho_schedule": "linear_warmup"}, "sam_rho_warmup_steps=0 does not go with"),
        ({"sam": "sam", "sam_rho_warmup_steps": 5}, 'sam_rho_warmup_steps=5 does not go with .*"constant"'),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_bad_option_is_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SAMTrainingArguments(str(tmp_path), **options)


def test_a_run_without_sam_may_carry_the_options_of_its_siblings(tmp_path):
    assert SAMTrainingArguments(str(tmp_path), sam="none", sam_rho=0.1, sam_trust_region="ema").sam == "none"


def test_every_option_reaches_the_optimizer():
    model = torch.nn.Linear(4, 3)

    def built(**options):
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        return SAMArguments(**options).build_optimizer(base, model, seed=3)

    assert built(sam="asam", sam_only="^bias$").only == "^bias$"
    fisher = built(sam="fisher-sam", sam_rho=0.3, sam_eta=0.5, sam_norm="linf", sam_stochastic_rounding=False)
    assert type(fisher) is samopt.FisherSAM
    assert (fisher.param_groups[0]["rho"], fisher.param_groups[0]["eta"], fisher.norm) == (0.3, 0.5, "linf")
    assert fisher.state_dict()["samopt"] == {"version": 1}  # no stochastic rounding whose position would be kept
    ema = built(
        sam="tram",
        sam_trust_region="ema",
        sam_ema_decay=0.9,
        sam_scale=2.0,
        sam_max_radius=0.7,
        sam_geometry="euclidean",
        sam_divergence="l2",
    )
    assert isinstance(ema.trust_region, EMA)
    assert (ema.trust_region.decay, ema.max_radius, ema.param_groups[0]["scale"]) == (0.9, 0.7, 2.0)
    assert isinstance(ema.geometry, samopt.parts.geometry.Euclidean)
    noise = built(sam="tram", sam_trust_region="input_noise", sam_noise_std=0.2)
    assert isinstance(noise.trust_region, InputNoise)
    assert (noise.trust_region.std, noise.trust_region.seed) == (0.2, 3)
    for name, kind in (("sam", samopt.SAM), ("asam", samopt.ASAM), ("fisher-sam", samopt.FisherSAM)):
        plain = kind(torch.optim.SGD(model.parameters(), lr=0.1))
        assert built(sam=name).param_groups[0]["rho"] == plain.param_groups[0]["rho"]
    with pytest.raises(ValueError, match=f'sam is "none"; choose one of {", ".join(samopt.available())}'):
        built(sam="none")


@pytest.mark.parametrize("name", samopt.available())
def test_every_optimizer_is_made_by_its_name(name):
    model = torch.nn.Linear(4, 3)
    base = torch.optim.Adam(model.parameters(), lr=0.1)
    made = SAMArguments(sam=name).build_optimizer(base, model, seed=0)
    assert type(made) is type(samopt.create(name, torch.optim.Adam(model.parameters(), lr=0.1), model=model))
    choices = typing.get_args(typing.get_args(typing.get_type_hints(SAMArguments)["sam"])[0])
    assert list(choices) == ["none", *samopt.available()]


@pytest.mark.parametrize("text", ["last 25 %", "last 25%", "0.25"])
def test_a_late_share_on_the_command_line(text, tmp_path):
    parser = transformers.HfArgumentParser(SAMTrainingArguments)
    (arguments,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--sam", "sam", "--sam_late", text]
    )
    assert arguments.first_perturbed_step(40) == 30
    (from_yaml,) = parser.parse_dict({"output_dir": str(tmp_path), "sam": "sam", "sam_late": 0.25})
    assert from_yaml.first_perturbed_step(40) == 30
    assert SAMArguments(sam="sam").first_perturbed_step(-1) == 0
    with pytest.raises(ValueError, match=r"sam_late=0.25 is a share of the run, .* max_steps is -1; set max_steps="):
        from_yaml.first_perturbed_step(-1)
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args_into_dataclasses(["--help"])


def test_options_of_a_single_optimizer(tmp_path):
    parser = transformers.HfArgumentParser(SAMTrainingArguments)
    line = ["--output_dir", str(tmp_path), "--sam", "gsam", "--sam_options", '{"alpha": 0.25}']
    (arguments,) = parser.parse_args_into_dataclasses(line)
    model = torch.nn.Linear(4, 3)
    made = arguments.build_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, seed=0)
    assert made.combination.alpha == 0.25
    assert json.loads(arguments.to_json_string())["sam_options"] == {"alpha": 0.25}


def test_a_trainer_without_a_chosen_optimizer_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"SAMTrainer trains without SAM.*sam=\"none\" if that is meant"):
        SAMTrainer(hf.norms(), args=SAMTrainingArguments(str(tmp_path), use_cpu=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        SAMTrainer(hf.norms(), args=SAMTrainingArguments(str(tmp_path), use_cpu=True, sam="none"))
        SAMTrainer(hf.norms(), args=SAMTrainingArguments(str(tmp_path), use_cpu=True, sam="sam"))


@pytest.mark.parametrize("kind", [SAMTrainingArguments, "mixed"])
def test_a_plain_trainer_with_these_arguments_warns(kind, tmp_path):
    if kind == "mixed":
        kind = dataclasses.make_dataclass("Mixed", [], bases=(SAMArguments, transformers.Seq2SeqTrainingArguments))
    options = {"use_cpu": True, "max_steps": 2, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}

    def made(sam):
        return transformers.Trainer(
            hf.norms(), args=kind(str(tmp_path), sam=sam, **options), train_dataset=hf.points(8)
        )

    with pytest.warns(UserWarning, match=r'Trainer ignores sam="asam".*use SAMTrainer.*make_sharpness_aware') as said:
        made("asam").train()
    assert len([warning for warning in said if "ignores sam" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ignores sam")
        made("none").train()
        make_sharpness_aware(made("asam")).train()


def test_any_arguments_take_the_fields(tmp_path):
    @dataclasses.dataclass
    class Arguments(SAMArguments, transformers.Seq2SeqTrainingArguments):
        pass

    arguments = Arguments(str(tmp_path), sam="asam", predict_with_generate=True)
    assert (arguments.sam, arguments.predict_with_generate) == ("asam", True)


def test_arguments_without_the_fields_are_refused(tmp_path):
    with pytest.raises(
        TypeError, match="needs arguments with the fields of SAMArguments, got TrainingArguments; use SAM"
    ):
        hf.make_trainer(tmp_path, hf.norms(), hf.points(), arguments=transformers.TrainingArguments)
    plain = hf.make_trainer(
        tmp_path, hf.norms(), hf.points(), kind=transformers.Trainer, arguments=transformers.TrainingArguments
    )
    with pytest.raises(TypeError, match="needs options, since TrainingArguments has none of them"):
        make_sharpness_aware(plain)
    assert type(plain) is transformers.Trainer
    ours = hf.make_trainer(tmp_path, hf.norms(), hf.points())
    with pytest.raises(ValueError, match="SAMTrainer is sharpness-aware already"):
        make_sharpness_aware(ours, sam="sam")


def test_arguments_with_the_fields_serve_a_trainer_made_sharpness_aware(tmp_path):
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(8), kind=transformers.Trainer, sam="asam")
    make_sharpness_aware(trainer).train()
    assert isinstance(trainer.sam_optimizer, samopt.ASAM)


def with_accelerator(**attributes):
    """A SAMTrainer whose accelerator claims to be of another kind."""

    class Disguised(SAMTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            real = self.accelerator
            self.accelerator = SimpleNamespace(
                **{"scaler": None, "state": real.state, "unwrap_model": real.unwrap_model} | attributes
            )

    return Disguised


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"distributed_type": DistributedType.DEEPSPEED}, "under DEEPSPEED: its engine owns the gradients"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "under MEGATRON_LM: its engine runs forward, backward and"),
        ({"distributed_type": DistributedType.FSDP, "is_fsdp2": False}, "under FSDP1: its flat parameters hide"),
    ],
    ids=["DeepSpeed", "Megatron", "FSDP1"],
)
def test_parallelism_without_a_second_pass_is_refused(attributes, message, tmp_path):
    with pytest.raises(ValueError, match=f"cannot run a second pass {message}"):
        hf.make_trainer(tmp_path, hf.norms(), hf.points(), kind=with_accelerator(**attributes))


def test_without_sam_nothing_is_refused(tmp_path):
    kind = with_accelerator(distributed_type=DistributedType.DEEPSPEED)
    assert hf.make_trainer(tmp_path, hf.norms(), hf.points(), kind=kind, sam="none").sam_optimizer is None


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimizers_that_step_in_backward_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=f'optim="{optim}", which moves the weights during the backward pass'):
        hf.make_trainer(tmp_path, hf.norms(), hf.points(), base=None, optim=optim)


def test_an_optimizer_that_is_sharpness_aware_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="was given ASAM around AdamW; pass the inner one"):
        hf.make_trainer(tmp_path, hf.norms(), hf.points(), base=lambda model: samopt.ASAM(hf.adamw(model)))


def test_the_fisher_geometry_is_refused_under_a_scaler(tmp_path):
    kind = with_accelerator(distributed_type=DistributedType.NO, scaler=torch.amp.GradScaler("cpu"), is_fsdp2=False)
    for options in ({"sam": "fisher-sam"}, {"sam": "tram", "sam_geometry": "fisher"}):
        with pytest.raises(ValueError, match="cannot take the Fisher geometry under a GradScaler"):
            hf.make_trainer(tmp_path, hf.norms(), hf.points(), kind=kind, **options)


class OnPolicy(transformers.Trainer):
    """Trains on what its model writes, in the way that reinforcement learning trainers do."""

    def _prepare_inputs(self, inputs):
        return self._completed(super()._prepare_inputs(inputs))

    def _completed(self, inputs):
        with torch.no_grad():
            return [self.model.generate(row) for row in inputs]


class GeneratesToEvaluate(transformers.Trainer):
    """Generates, but not while it trains."""

    def prediction_step(self, model, inputs, *args, **options):
        return model.generate(inputs)


def test_trainers_that_generate_in_the_training_step_are_refused(tmp_path):
    class Ours(SAMTrainerMixin, OnPolicy):
        pass

    class Fine(SAMTrainerMixin, GeneratesToEvaluate):
        pass

    with pytest.raises(ValueError, match=r"Ours generates text in .* \(_prepare_inputs -> _completed -> generate\)"):
        hf.make_trainer(tmp_path, hf.norms(), hf.points(), kind=Ours)
    assert hf.make_trainer(tmp_path, hf.norms(), hf.points(), kind=Fine).sam_optimizer is None
    plain = hf.make_trainer(tmp_path, hf.norms(), hf.points(), kind=OnPolicy, arguments=transformers.TrainingArguments)
    with pytest.raises(ValueError, match="OnPolicy generates text in its training step"):
        make_sharpness_aware(plain, sam="sam")


@pytest.mark.parametrize(
    ("module", "missing"),
    [("transformers", "transformers"), ("transformers", "accelerate"), ("accelerate", "accelerate")],
)
def test_a_missing_framework_is_named_with_its_extra(module, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import samopt.integrations.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: samopt.integrations.{module} needs {missing}, which is not installed" in done.stderr
    assert 'pip install "samopt[hf]"' in done.stderr
