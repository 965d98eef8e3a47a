"""Bad recipes, each with its exact error text. The good recipe beside them passes, so each error has one cause."""

# ruff: noqa: E501

import re
from pathlib import Path

import pytest

from slime.config.check_combinations import check_combinations
from slime.config.check_functions import check_functions
from slime.config.check_sizes import check_sizes
from slime.config.checks import check, check_device, check_values
from slime.config.exits import ConfigError, PreflightError
from slime.config.load import compose
from slime.config.overrides import RECIPES as SHIPPED
from tests.config.composing import composed

GOOD = ["model.path=model", "data.train=[{path: p.jsonl}]"]
ALGORITHMS = "grpo, rloo, reinforce_pp, reinforce_pp_baseline, ppo, gspo, cispo, opd, sft"
RUN = " (run.steps x trainer.updates_per_batch x trainer.epochs_per_batch)"

BAD_KEYS = {
    "run.step=3": "unknown key run.step: did you mean run.steps?",
    "learning.rate=3": "unknown key learning.rate: a recipe has run, model, data, rollout, reward, trainer, algorithm, critic, sync, cluster, observe",
    "lr=3": "unknown key lr: did you mean trainer.lr or critic.lr?",
    "+rollout.temprature=1": "unknown key rollout.temprature: did you mean rollout.temperature?",
    "trainer.max_response_tokens=8": "unknown key trainer.max_response_tokens: "
    "did you mean data.eval.<name>.max_response_tokens or rollout.max_response_tokens?",
    "algorithm.importance_bound=mask": "unknown key algorithm.importance_bound: "
    "did you mean algorithm.importance_low or algorithm.importance or algorithm.importance_high?",
    "data.eval.heldout.pth=x": "unknown key data.eval.heldout.pth: did you mean data.eval.heldout.path?",
    "data.train.first.path=x": "data.train.first.path: data.train is a list; its items are data.train.0, data.train.1, ...",
    "data.train[0].path=x": "data.train[0].path=x: a position in a list is written with a dot: data.train.0.path=x",
    "run.seed.x=1": "run.seed.x: run.seed is a whole number and has nothing below it",
    "model=qwen3": "model=qwen3: model is a group of knobs; set one of model.path, model.family, model.dtype",
    "~run.seed": "~run.seed: a knob cannot be removed; set it to another value",
    "~reward.pattern": "~reward.pattern: a knob cannot be removed; set reward.pattern=null",
    "~rollout.stop": "~rollout.stop: a knob cannot be removed; set rollout.stop=[]",
    "~data.eval": "~data.eval: a dictionary cannot be removed; remove a name with '~data.eval.<name>'",
    "~data": "~data: a group of knobs cannot be removed; set its knobs",
    "~data.eval.h": "~data.eval.h: there is no data.eval.h to remove",
    "data.eval={}": "data.eval={}: dictionaries are merged, so an empty one changes nothing; remove a name with '~data.eval.<name>'",
    "quickstart": "quickstart: not key=value; the recipe's name goes to --config-name",
    r"reward.pattern=^\d+$": r"reward.pattern=^\d+$: Hydra cannot read the value; quote it twice, once for the shell and once for Hydra: "
    r"""'reward.pattern="^\d+$"'""",
}

BAD_TYPES = {
    "run.steps=many": "run.steps=many: takes a whole number, >= 1. "
    "Updates to complete; one update trains one batch of rollout.prompts_per_step prompts.",
    "run.steps=null": "run.steps=null: takes a whole number, >= 1. "
    "Updates to complete; one update trains one batch of rollout.prompts_per_step prompts.",
    "run.seed=1.5": "run.seed=1.5: takes a whole number, >= 0, <= 4294967295. "
    "The one seed: data order, sampling, initialisation and dropout derive from it.",
    "trainer.lr=fast": "trainer.lr=fast: takes a number, >= 0. Peak learning rate of Adam.",
    "rollout.dump=maybe": "rollout.dump=maybe: takes true or false. Write every batch and its samples to rollouts/ in the run's directory.",
    "rollout.stop=x": "rollout.stop=x: takes a list. Strings that end an answer, beside the tokenizer's end tokens.",
    "data.train=[ok.jsonl]": "data.train[0]=ok.jsonl: an item is {path: ok.jsonl}, as in data.train=[{path: ok.jsonl}]",
    "data.train=x": "data.train=x: takes a list",
    "algorithm.importance_reject.token=5": "algorithm.importance_reject.token=5: takes a list",
    "data.train=[{pth: x}]": "unknown key data.train.0.pth: did you mean data.train.0.path?",
    "data.train.1.path=x": "data.train[1]: data.train has no such item; give the whole list: data.train=[{path: ...}, ...]",
    "data.eval.x.samples=2": "data.eval.x.path is required: A .jsonl or .parquet file of prompts.",
    "run.seed=${run.stepz}": "run.seed: Interpolation key 'run.stepz' not found",
}

BAD_VALUES = {
    "run.steps=0": "run.steps=0: must be at least 1",
    "trainer.beta1=1": "trainer.beta1=1: must be below 1",
    "trainer.beta2=1.0": "trainer.beta2=1: must be below 1",
    "trainer.lr=inf": "trainer.lr=inf: takes a finite number",
    "trainer.lr=nan": "trainer.lr=nan: takes a finite number",
    "data.eval={h: {path: p.jsonl, temperature: inf}}": "data.eval.h.temperature=inf: takes a finite number",
    "data.eval={h: {path: p.jsonl, samples: 0}}": "data.eval.h.samples=0: must be at least 1",
    "rollout.temperature=0": "rollout.temperature=0: must be above 0",
    "data.train=[{path: p.jsonl, weight: 0}]": "data.train.0.weight=0: must be above 0",
    "observe.wandb=onlin": "observe.wandb=onlin: takes offline, online, off; did you mean online?",
    "rollout.mode=async": "rollout.mode=async: takes sync, one_step_off",
    "rollout.mode=Sync": "rollout.mode=Sync: takes sync, one_step_off; did you mean sync?",
    "model.dtype=float16": "model.dtype=float16: takes bf16, fp32",
    "algorithm.name=zebra": f"algorithm.name=zebra: takes {ALGORITHMS} or an import path pkg.mod:fn",
    "algorithm.name=GRPO": f"algorithm.name=GRPO: takes {ALGORITHMS} or an import path pkg.mod:fn; did you mean grpo?",
    "run.seed=4294967296": "run.seed=4294967296: must be at most 4294967295",
    "run.name=a/b": "run.name=a/b: names one directory below run.dir; use letters, digits and . _ - + = , @",
    "algorithm.name=grop": f"algorithm.name=grop: takes {ALGORITHMS} or an import path pkg.mod:fn; did you mean grpo?",
    "algorithm.name=nowhere:f": "algorithm.name=nowhere:f: no module nowhere; is its folder in PYTHONPATH or the working directory?",
    "algorithm.name=functions:keep": "algorithm.name=functions:keep returned bool; it must return slime.algorithms.base.Algorithm",
    "algorithm.name=functions:broken": "algorithm.name=functions:broken: it failed with AttributeError: 'AlgorithmConfig' object has no "
    "attribute 'no_such_knob'",
    "data.eval={h: {path: p.jsonl, reward: mth}}": "data.eval.h.reward=mth: takes exact, numeric, math, format or an import path pkg.mod:fn; "
    "did you mean math?",
    "reward.overlong_penalty=0": "reward.overlong_penalty=0: must be above 0",
    "reward.fn=mth": "reward.fn=mth: takes exact, numeric, math, format or an import path pkg.mod:fn; did you mean math?",
    "reward.fn=functions:keeps": "reward.fn=functions:keeps: module functions has no keeps; did you mean keep?",
    "reward.fn=functions:THREE": "reward.fn=functions:THREE: module functions's THREE is int, not a function",
    "rollout.filter=nowhere:f": "rollout.filter=nowhere:f: no module nowhere; is its folder in PYTHONPATH or the working directory?",
    "rollout.generate=functions:answer": "rollout.generate=functions:answer: not an async function; write async def fn(sample, client, cfg)",
    "rollout.filter=functions:later": "rollout.filter=functions:later: it returns a coroutine, which is always true, so every group would be "
    "kept; write def fn(group) -> bool",
    "rollout.filter=functions:each": "rollout.filter=functions:each: it returns a generator, which is always true, so every group would be "
    "kept; write def fn(group) -> bool",
    "rollout.filter=functions:nothing": "rollout.filter=functions:nothing: slime calls it as fn(group), and nothing() does not take that "
    "(too many positional arguments)",
    "rollout.generate=functions:turn": "rollout.generate=functions:turn: slime calls it as fn(sample, client, cfg), and turn(sample, client) "
    "does not take that (too many positional arguments)",
    "reward.fn=functions:compute_score": "reward.fn=functions:compute_score: slime calls it as fn(sample) (reward.signature=sample), and "
    "compute_score(data_source, solution_str, ground_truth, extra_info=...) has the parameters of verl's; set reward.signature=verl",
    "data.eval={h: {path: p.jsonl, reward: 'functions:two'}}": "data.eval.h.reward=functions:two: slime calls it as fn(sample) "
    "(reward.signature=sample), and two(args, sample) does not take that (missing a required argument: 'sample'); set reward.signature=slime",
    "reward.fn=functions:nothing": "reward.fn=functions:nothing: slime calls it as fn(sample) (reward.signature=sample), and nothing() does "
    "not take that (too many positional arguments); reward.signature is one of sample, group, verl, slime",
    "reward.url=localhost:80": "reward.url=localhost:80: not an http:// or https:// address",
    "rollout.external_urls=[localhost]": "rollout.external_urls: 'localhost' is not http://host:port",
    "rollout.stop=['']": "rollout.stop has an empty string, which would end every answer at once: remove it",
    "cluster.roles.actr.devices=1": "cluster.roles.actr: no such role; there are actor, critic, rollout; did you mean actor?",
    "critic.value_clip=0": "critic.value_clip=0: must be above 0",
}

BAD_FILES = {
    "model.path=nowhere": "model.path=nowhere: no such folder, and not a hub id (org/name) (relative paths start at {cwd})",
    "model.path=model/x": "model.path=model/x: no such folder, and not a hub id (org/name) (relative paths start at {cwd})",
    "model.path=/no/model": "model.path=/no/model: no such folder, and not a hub id (org/name)",
    "model.path=data/quickstart/warm": "model.path=data/quickstart/warm: no such folder, and not a hub id (org/name) (relative paths start at "
    "{cwd}); `make quickstart` in slime's repository makes it",
    "data.train.0.path=~/q.jsonl": "data.train.0.path={home}/q.jsonl: no such file",
    "model.path=rollouts": "model.path=rollouts: no config.json there; give a Hugging Face model directory",
    "data.train=[]": "data.train is empty: name files of prompts, data.train=[{path: prompts.jsonl}]",
    "data.train=[{path: q.jsonl}]": "data.train.0.path=q.jsonl: no such file (relative paths start at {cwd})",
    "data.train=[{path: p.csv}]": "data.train.0.path=p.csv: not a .jsonl or .parquet file",
    "data.train=[{path: p.jsonl}, {path: empty.jsonl}]": "data.train.1.path=empty.jsonl: the file is empty",
    "data.eval.h.path=q.jsonl": "data.eval.h.path=q.jsonl: no such file (relative paths start at {cwd})",
    "run.resume=allways": "run.resume=allways: neither auto, never, must nor a run's folder",
    "run.resume=atuo": "run.resume=atuo: neither auto, never, must nor a run's folder; did you mean auto?",
    "rollout.engine_python=/no/python": "rollout.engine_python=/no/python: no such program here; give the path of the python that has SGLang",
    "rollout.max_response_tokens=4000": "data.max_prompt_tokens=1024 + rollout.max_response_tokens=4000 exceed the 4096 positions of the model "
    "(max_position_embeddings in its config.json): lower one of them",
}

TRAIN = "run.only=train run.replay=rollouts"
REPLAYS = "no effect with run.only=train, which replays rollouts: remove"
ONE_STEP = (
    "no effect with trainer.updates_per_batch=1 and trainer.epochs_per_batch=1: a batch's only optimizer step begins where ratios are 1 and "
    "values have not moved; raise one of the two"
)
DEMONSTRATIONS = "no effect with algorithm.name=sft, which learns from demonstrations: remove"

INERT = {
    f"{TRAIN} rollout.dump=true": f"rollout.dump=true has {REPLAYS} it",
    "algorithm.name=sft rollout.temperature=0.7": f"rollout.temperature=0.7 has {DEMONSTRATIONS} it",
    "algorithm.name=sft rollout.top_p=0.9": f"rollout.top_p=0.9 has {DEMONSTRATIONS} it",
    "algorithm.name=sft rollout.filter=functions:keep": f"rollout.filter=functions:keep has {DEMONSTRATIONS} it",
    "algorithm.name=sft rollout.samples_per_prompt=1": f"rollout.samples_per_prompt=1 has {DEMONSTRATIONS} it",
    "algorithm.name=sft rollout.dump=true": f"rollout.dump=true has {DEMONSTRATIONS} it",
    "algorithm.name=sft rollout.external_urls=['http://h:1']": f"rollout.external_urls (http://h:1) has {DEMONSTRATIONS} it",
    "algorithm.name=sft rollout.mask_truncated=true": f"rollout.mask_truncated=true has {DEMONSTRATIONS} it",
    "algorithm.name=sft reward.overlong_buffer=9": f"reward.overlong_buffer=9 has {DEMONSTRATIONS} it",
    "algorithm.name=sft reward.workers=4": f"reward.workers=4 has {DEMONSTRATIONS} it",
    "algorithm.name=sft data.eval.h.path=p.jsonl": f"data.eval (h) has {DEMONSTRATIONS} it",
    "algorithm.name=sft run.only=train run.replay=rollouts rollout.temperature=0.7": f"rollout.temperature=0.7 has {DEMONSTRATIONS} it",
    "algorithm.name=functions:imitate rollout.dump=true": "rollout.dump=true has no effect with algorithm.name=functions:imitate, which learns "
    "from demonstrations: remove it",
}

BAD_COMBINATIONS = {
    "run.max_hours=0.01": "run.max_hours=0.01 is 36 s, and the run stops run.grace_s=60 s before: raise it, or lower run.grace_s",
    "run.accept_changes=[trainer.warmup]": "run.accept_changes: unknown key trainer.warmup: did you mean trainer.warmup_steps?",
    "run.accept_changes=[trainer]": "run.accept_changes: trainer is no knob; name each, as in run.accept_changes='[trainer.lr]'",
    "run.only=train": "run.only=train reads rollouts from a directory: set run.replay to one that rollout.dump=true wrote",
    "run.replay=rollouts": "run.replay=rollouts has no effect with run.only=all: set run.only=train, or unset run.replay",
    "run.only=train run.replay=nowhere": "run.replay=nowhere: no such folder or .npz file; it is the rollouts/ that a run "
    "with rollout.dump=true wrote, or a batch of the stopped/ of a run that it stopped",
    "run.only=rollout": "run.only=rollout without rollout.dump=true would throw all rollouts away: set rollout.dump=true",
    "rollout.external_urls=['http://h:1'] cluster.roles.rollout.devices=2": "cluster.roles.rollout.devices=2 has no effect with "
    "rollout.external_urls, whose servers have devices of their own: remove it, or the urls",
    "rollout.sglang.dtype=float16": "rollout.sglang.dtype is set by slime: use model.dtype",
    "rollout.sglang.random_seed=3": "rollout.sglang.random_seed is set by slime: use run.seed",
    "rollout.sglang.context_length=2000": "rollout.sglang.context_length=2000 is below data.max_prompt_tokens=1024 + "
    "rollout.max_response_tokens=1024: raise it, or lower one of them",
    "reward.pattern=x": "reward.pattern=x has no effect with reward.fn=exact: set reward.fn=format, or remove reward.pattern",
    "reward.fn=format": "reward.fn=format judges by a regular expression: set reward.pattern",
    "data.eval={h: {path: p.jsonl, reward: format}}": "data.eval.h.reward=format judges by a regular expression: set reward.pattern",
    "reward.pattern=x data.eval={h: {path: p.jsonl, reward: math}}": "reward.pattern=x has no effect with reward.fn=exact, "
    "data.eval.h.reward=math: set reward.fn=format, or remove reward.pattern",
    "data.eval={h: {path: p.jsonl, max_response_tokens: 4000}}": "data.max_prompt_tokens=1024 + data.eval.h.max_response_tokens=4000 exceed "
    "the 4096 positions of the model (max_position_embeddings in its config.json): lower one of them",
    "data.eval={h: {path: p.jsonl, limit: 0}}": "data.eval.h.limit=0: must be at least 1",
    "reward.fn=format reward.pattern='['": "reward.pattern=[: not a regular expression: unterminated character set at position 0",
    "reward.fn=math reward.signature=verl": "reward.signature=verl has no effect with reward.fn=math, which is built in: remove reward.signature",
    "reward.fn=math reward.url=http://h:1/r": "reward.fn=math has no effect with reward.url: set one of the two",
    "reward.overlong_penalty=0.5": "reward.overlong_penalty=0.5 has no effect with reward.overlong_buffer=0: set it, or remove the penalty",
    "reward.overlong_buffer=1025": "reward.overlong_buffer=1025 is above rollout.max_response_tokens=1024, whose last tokens it is: lower it",
    "algorithm.name=opd algorithm.distill=sampled algorithm.teachers.t.path=model reward.overlong_buffer=8": "reward.overlong_buffer=8 has no "
    "effect with algorithm.name=opd, which learns from no reward: remove it",
    "rollout.oversample=0.5": "rollout.oversample=0.5 has no effect with rollout.select=ordinal: set rollout.select=arrival, or remove it",
    "rollout.external_key_env=KEY": "rollout.external_key_env=KEY has no effect with no rollout.external_urls: set rollout.external_urls "
    "or rollout.join, or remove it",
    "rollout.external_urls=['http://h:1'] rollout.external_key_env=NO_KEY": "rollout.external_key_env=NO_KEY: no environment variable has this "
    "name; export it with the servers' key (the knob is its name alone)",
    "rollout.external_urls=['http://h:1'] rollout.sglang.mem_fraction_static=0.5": "rollout.sglang has no effect with rollout.external_urls, "
    "whose servers run already: remove rollout.sglang, or the urls",
    "trainer.decay_steps=5": "trainer.decay_steps=5 has no effect with trainer.schedule=constant: "
    "set trainer.schedule to cosine or wsd, or remove it",
    "trainer.schedule=wsd trainer.decay_steps=1": "trainer.decay_steps=1: must be at least 2",
    "trainer.schedule=cosine trainer.decay_steps=0": "trainer.decay_steps=0: must be at least 1",
    "trainer.schedule=cosine trainer.min_lr=1": "trainer.min_lr=1 is above trainer.lr=1e-06, the peak: lower it",
    "trainer.warmup_steps=100": f"trainer.warmup_steps=100 leaves nothing of the run's 100 optimizer steps{RUN}: lower it",
    "trainer.schedule=wsd trainer.warmup_steps=60 trainer.decay_steps=50": "trainer.warmup_steps=60 + trainer.decay_steps=50 exceed "
    f"the run's 100 optimizer steps{RUN}: lower one",
    "trainer.schedule=wsd trainer.warmup_steps=95": "trainer.warmup_steps=95 + trainer.decay_steps=10 (its default, a tenth) exceed "
    f"the run's 100 optimizer steps{RUN}: lower one",
    "run.eval_every=5": "run.eval_every=5 has no effect with no data.eval: add a set (data.eval.<name>.path=...), or set run.eval_every=0",
    "data.eval.h.path=p.jsonl data.eval.h.samples=4": "data.eval.h.samples=4 has no effect with data.eval.h.temperature=0, "
    "where all answers are the same: set data.eval.h.temperature above 0",
    "algorithm.name=sft algorithm.clip_high=0.3": "algorithm.clip_high=0.3 has no effect with algorithm.name=sft: remove it, or choose one "
    "that reads it (grpo, rloo, reinforce_pp, reinforce_pp_baseline, ppo, gspo, cispo, opd)",
    "algorithm.distill_coef=0.5": "algorithm.distill_coef=0.5 has no effect with algorithm.distill=none: remove it, or set algorithm.distill",
    "algorithm.name=opd": "algorithm.distill=none leaves algorithm.name=opd nothing to learn: choose sampled, topk or full",
    "algorithm.clip_high=0.28": f"algorithm.clip_high=0.28 has {ONE_STEP}, or remove it",
    "algorithm.name=gspo algorithm.clip_low=0.1 algorithm.clip_dual=3": f"algorithm.clip_low=0.1, algorithm.clip_dual=3 have {ONE_STEP}, or "
    "remove them",
    "algorithm.name=ppo critic.value_clip=0.5": f"critic.value_clip=0.5 has {ONE_STEP}, or remove it",
    "algorithm.name=functions:judged critic.value_clip=0.5 algorithm.clip_low=0.1": f"critic.value_clip=0.5 has {ONE_STEP}, or remove it",
    "critic.lr=1e-4": "critic.lr=0.0001 has no effect with algorithm.name=grpo, which uses no critic: remove it, or choose ppo",
    "critic.value_clip=null critic.warmup_steps=3 cluster.roles.critic.devices=1": "critic.value_clip=None, critic.warmup_steps=3, "
    "cluster.roles.critic.devices=1 have no effect with algorithm.name=grpo, which uses no critic: remove them, or choose ppo",
    "algorithm.name=functions:explore critic.path=model": "critic.path=model has no effect with algorithm.name=functions:explore, which uses "
    "no critic: remove it, or choose ppo",
    "algorithm.name=ppo critic.warmup_steps=100": "critic.warmup_steps=100 leaves the policy none of run.steps=100 to learn in: lower it",
    "algorithm.name=ppo critic.warmup_steps=40 trainer.warmup_steps=60": "trainer.warmup_steps=60 leaves nothing of the run's 60 optimizer "
    "steps ((run.steps - critic.warmup_steps) x trainer.updates_per_batch x trainer.epochs_per_batch): lower it",
    "algorithm.name=ppo cluster.roles.actor.devices=2 cluster.roles.critic.devices=3 trainer.tensor_parallel=2": "cluster.roles.critic."
    "devices=3 does not divide by trainer.tensor_parallel=2: make the devices a multiple of it",
    "algorithm.name=ppo rollout.prompts_per_step=1 rollout.samples_per_prompt=2 cluster.roles.critic.devices=4": "one update has 2 samples "
    "and there are 4 data-parallel ranks (cluster.roles.critic.devices=4, 1 for each copy of the model): raise rollout.prompts_per_step, "
    "or lower cluster.roles.critic.devices or trainer.updates_per_batch",
    "algorithm.name=sft run.only=rollout": "run.only=rollout with algorithm.name=sft: it learns from demonstrations and generates nothing; "
    "choose another algorithm.name",
    "rollout.samples_per_prompt=1": "rollout.samples_per_prompt=1 with algorithm.name=grpo: a group of one has no advantage; set at least 2",
    "run.deterministic=true rollout.select=arrival": "run.deterministic=true with rollout.select=arrival: arrival order depends on timing; "
    "set rollout.select=ordinal",
    "run.deterministic=true rollout.join=f": "run.deterministic=true with rollout.join: when a server joins decides which one answers; "
    "unset rollout.join",
    "run.deterministic=true cluster.device=cuda": "run.deterministic=true with cluster.device=cuda: equal bits are promised on the CPU only; "
    "set cluster.device=cpu",
    "cluster.address=h:6379 cluster.object_store_mb=99": "cluster.object_store_mb=99 has no effect with cluster.address, "
    "whose Ray runs already: remove it",
    "sync.bucket_mb=600": "sync.bucket_mb=600 does not fit into cluster.object_store_mb=512: lower the one or raise the other",
    "sync.mode=full sync.codec=exponent": "sync.codec=exponent has no effect with sync.mode=full: set sync.mode=delta, or remove it",
    "sync.url=s3://b/w": "sync.url=s3://b/w has no effect with sync.transport=ray: set sync.transport=store, or remove it",
    "rollout.sglang.quantization=fp8": "rollout.sglang.quantization is set by slime: use rollout.quantization",
    "sync.key_env=NO_SUCH_KEY": "sync.key_env=NO_SUCH_KEY: no such environment variable; export it, or unset sync.key_env",
    "cluster.roles.actor.devices=3 trainer.tensor_parallel=2": "cluster.roles.actor.devices=3 does not divide by trainer.tensor_parallel=2: "
    "make the devices a multiple of it",
    "rollout.engines=2": "rollout.engines=2 of rollout.tensor_parallel=1 take 2 devices and cluster.roles.rollout.devices=1: make them equal",
    "trainer.updates_per_batch=5": "rollout.prompts_per_step=32 does not divide by trainer.updates_per_batch=5: "
    "make the prompts a multiple of it",
    "rollout.prompts_per_step=1 rollout.samples_per_prompt=2 cluster.roles.actor.devices=4": "one update has 2 samples and there are 4 "
    "data-parallel ranks (cluster.roles.actor.devices=4, 1 for each copy of the model): raise rollout.prompts_per_step, "
    "or lower cluster.roles.actor.devices or trainer.updates_per_batch",
}

BAD_PARALLEL = {
    "cluster.roles.actor.devices=6 trainer.tensor_parallel=2 trainer.pipeline_parallel=2": "cluster.roles.actor.devices=6 does not divide by "
    "trainer.tensor_parallel=2 x trainer.pipeline_parallel=2: make the devices a multiple of 4",
    "cluster.roles.actor.devices=4 trainer.context_parallel=3": "cluster.roles.actor.devices=4 does not divide by trainer.context_parallel=3: "
    "make the devices a multiple of it",
    "cluster.roles.actor.devices=6 trainer.expert_parallel=4": "cluster.roles.actor.devices=6 does not divide by trainer.expert_parallel=4, "
    "the ranks that hold all experts once: make the devices a multiple of it",
    "cluster.roles.actor.devices=6 trainer.tensor_parallel=2 trainer.expert_parallel=2": "cluster.roles.actor.devices=6 does not divide by "
    "trainer.tensor_parallel=2 x trainer.expert_parallel=2, the ranks that hold all experts once: make the devices a multiple of 4",
    "cluster.roles.actor.devices=2 trainer.expert_parallel=2 trainer.megatron.expert_tensor_parallel_size=2": "cluster.roles.actor.devices=2 "
    "does not divide by trainer.megatron.expert_tensor_parallel_size=2 x trainer.expert_parallel=2, the ranks that hold all experts once: "
    "make the devices a multiple of 4",
    "cluster.roles.actor.devices=2 trainer.tensor_parallel=2 trainer.megatron.expert_tensor_parallel_size=1": "trainer.megatron."
    "expert_tensor_parallel_size=1 differs from trainer.tensor_parallel=2, which needs trainer.expert_parallel above 1: raise it, "
    "or remove the option",
    "trainer.megatron.expert_tensor_parallel_size=two": "trainer.megatron.expert_tensor_parallel_size=two: takes a whole number, >= 1, or null",
    "trainer.megatron.virtual_pipeline_model_parallel_size=0": "trainer.megatron.virtual_pipeline_model_parallel_size=0: "
    "takes a whole number, >= 1, or null",
    "trainer.megatron.virtual_pipeline_model_parallel_size=true": "trainer.megatron.virtual_pipeline_model_parallel_size=True: "
    "takes a whole number, >= 1, or null",
    "trainer.megatron.num_layers_in_last_pipeline_stage=1.5": "trainer.megatron.num_layers_in_last_pipeline_stage=1.5: "
    "takes a whole number, >= 1, or null",
    "trainer.megatron.sequence_parallel=null": "trainer.megatron.sequence_parallel=null: takes true or false",
    "trainer.megatron.account_for_loss_in_pipeline_split=1": "trainer.megatron.account_for_loss_in_pipeline_split=1: takes true or false",
    "trainer.megatron.virtual_pipeline_model_parallel_size=2": "trainer.megatron.virtual_pipeline_model_parallel_size=2 needs "
    "trainer.pipeline_parallel above 1: raise it, or remove the option",
    "trainer.megatron.num_layers_in_first_pipeline_stage=2": "trainer.megatron.num_layers_in_first_pipeline_stage=2 needs "
    "trainer.pipeline_parallel above 1: raise it, or remove the option",
    "trainer.megatron.account_for_embedding_in_pipeline_split=true": "trainer.megatron.account_for_embedding_in_pipeline_split=true needs "
    "trainer.pipeline_parallel above 1: raise it, or remove the option",
    "trainer.pipeline_parallel=2 trainer.megatron.num_layers_in_last_pipeline_stage=2 trainer.megatron.account_for_loss_in_pipeline_split=true": "trainer.megatron."
    "num_layers_in_last_pipeline_stage=2 and trainer.megatron.account_for_loss_in_pipeline_split=true exclude each other: remove one",
    "rollout.prompts_per_step=1 rollout.samples_per_prompt=2 cluster.roles.actor.devices=8 trainer.context_parallel=2": "one update has 2 "
    "samples and there are 4 data-parallel ranks (cluster.roles.actor.devices=8, 2 for each copy of the model): raise "
    "rollout.prompts_per_step, or lower cluster.roles.actor.devices or trainer.updates_per_batch",
}


def error_of(overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as raised:
        check(composed(*GOOD, *overrides))
    return str(raised.value)


def split(overrides: str) -> list[str]:
    """Overrides that stand in one string: values may have spaces."""
    return re.split(r" (?=[\w.]+=)", overrides)


@pytest.mark.parametrize(("override", "text"), (BAD_KEYS | BAD_TYPES | BAD_VALUES | BAD_FILES).items())
def test_one_bad_override(override: str, text: str, workdir) -> None:
    assert error_of([override]) == text.replace("{cwd}", str(workdir)).replace("{home}", str(Path.home()))


@pytest.mark.parametrize(("overrides", "text"), (INERT | BAD_COMBINATIONS | BAD_PARALLEL).items())
def test_overrides_that_do_not_go_together(overrides: str, text: str, workdir) -> None:
    assert error_of(split(overrides)) == text


PASS = [
    "run.seed=1",
    "algorithm.name=sft",
    "algorithm.name=sft rollout.samples_per_prompt=8 rollout.temperature=1.0 reward.fn=exact rollout.dump=false",
    "algorithm.name=functions:imitate algorithm.clip_low=0.1",
    "algorithm.name=functions:explore rollout.temperature=0.7",
    "run.only=train run.replay=rollouts data.train=[]",
    "run.only=train run.replay=rollouts rollout.temperature=0.7 rollout.select=ordinal trainer.lr=1e-3",
    "run.only=train run.replay=rollouts reward.fn=math sync.bucket_mb=8 data.eval.h.path=p.jsonl run.eval_every=2",
    "run.only=rollout rollout.dump=true rollout.temperature=0.7 reward.fn=math trainer.lr=1e-3 run.save_every=2",
    "run.deterministic=true rollout.mode=one_step_off",
    "algorithm.name=ppo critic.lr=1e-4 critic.value_clip=null critic.warmup_steps=10 critic.path=model trainer.updates_per_batch=2",
    "algorithm.clip_low=0.2 algorithm.clip_high=0.28 trainer.epochs_per_batch=2",
    "algorithm.name=ppo rollout.samples_per_prompt=1",
    "algorithm.name=ppo cluster.roles.critic.devices=2",
    "algorithm.name=functions:judged critic.lr=1e-4",
    "algorithm.name=ppo critic.lr=1e-4 cluster.roles.critic.devices=2 run.only=rollout rollout.dump=true",
    "reward.fn=format reward.pattern=x",
    "reward.overlong_buffer=1024 reward.overlong_penalty=0.5 rollout.mask_truncated=true",
    "rollout.external_urls=['http://h:1'] rollout.external_key_env=HOME",
    "rollout.generate=functions:turns rollout.filter=functions:keep reward.fn=functions:keep",
    "reward.fn=functions:compute_score reward.signature=verl rollout.generate=functions:scorer",
    "reward.fn=functions:two reward.signature=slime",
    "reward.fn=functions:keep reward.signature=group",
    "rollout.filter=builtins:max reward.fn=builtins:bool",
    "run.seed=4294967295 run.steps=3 run.save_every=10 run.eval_every=5 data.eval.h.path=p.jsonl",
    "rollout.sglang.context_length=2048",
    "trainer.schedule=wsd trainer.warmup_steps=50 trainer.decay_steps=50",
    "trainer.schedule=wsd trainer.warmup_steps=90",
    "cluster.roles.actor.devices=4 trainer.tensor_parallel=2 cluster.roles.rollout.devices=4 rollout.engines=2 rollout.tensor_parallel=2",
    "cluster.roles.actor.devices=8 trainer.pipeline_parallel=2 trainer.context_parallel=2 trainer.tensor_parallel=2",
    "cluster.roles.actor.devices=4 trainer.tensor_parallel=2 trainer.expert_parallel=4 trainer.megatron.expert_tensor_parallel_size=1",
    "cluster.roles.actor.devices=2 trainer.pipeline_parallel=2 trainer.megatron.virtual_pipeline_model_parallel_size=2",
    "trainer.megatron.virtual_pipeline_model_parallel_size=1 trainer.megatron.account_for_loss_in_pipeline_split=false",
    "run.only=rollout rollout.dump=true trainer.pipeline_parallel=4",
    "model.family=qwen3_moe",
    "data.eval.h.path=p.jsonl data.eval.h.samples=4 data.eval.h.temperature=1",
    "model.path=Qwen/Qwen3-0.6B",
]


@pytest.mark.parametrize("overrides", PASS)
def test_good_recipes_pass(overrides: str, workdir) -> None:
    check(composed(*GOOD, *split(overrides)))


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml") if path.stem != "base"))
def test_shipped_recipes_pass(name: str) -> None:
    """But for their files, which `make quickstart` makes."""
    cfg = compose(name).cfg
    for checked in (check_values, check_functions, check_combinations, check_sizes):
        checked(cfg)


def test_a_device_found_by_auto_is_checked_too() -> None:
    cfg = composed(*GOOD, "run.deterministic=true")
    check_device(cfg, "cpu")
    with pytest.raises(PreflightError) as raised:
        check_device(cfg, "cuda")
    assert str(raised.value) == (
        "run.deterministic=true with cluster.device=auto, which is cuda here: equal bits are promised on the CPU only; set cluster.device=cpu"
    )
    check_device(composed(*GOOD), "cuda")


def test_model_path_is_required(workdir) -> None:
    with pytest.raises(ConfigError) as raised:
        compose(overrides=["run.seed=1"])
    assert (
        str(raised.value)
        == "model.path is required: Hugging Face directory (config.json, safetensors, tokenizer), or a hub id to download."
    )


def test_model_config_that_is_not_json(workdir) -> None:
    (workdir / "model" / "config.json").write_text("{")
    assert error_of([]) == (
        "model.path=model: its config.json is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"
    )


RECIPES = {
    "run: {steps: 3}\n": "recipe mine does not begin with `defaults: [base, _self_]`",
    "defaults: [_self_]\nrun: {steps: 3}\n": "recipe mine does not begin with `defaults: [base, _self_]`",
    "": "recipe mine does not begin with `defaults: [base, _self_]`",
    "defaults: [base, _self_]\nrun: {stepz: 3}\n": "unknown key run.stepz (recipe mine): did you mean run.steps?",
    "defaults: [base, _self_]\nrun: {steps: many}\n": "run.steps=many (recipe mine): takes a whole number, >= 1. "
    "Updates to complete; one update trains one batch of rollout.prompts_per_step prompts.",
    "defaults: [base, _self_]\ndata: {train: [{pth: x}]}\n": "unknown key data.train.0.pth (recipe mine): did you mean data.train.0.path?",
    "defaults: [base, _self_]\ndata: {eval: null}\n": "data.eval=null (recipe mine): takes a dictionary",
    "defaults: [bass, _self_]\nrun: {steps: 3}\n": "no recipe bass, which recipe mine names in its defaults; "
    "there are {names}; did you mean base?",
    "defaults: [base, _self_]\nobserve: {wandb: off}\n": "observe.wandb=False: takes offline, online, off; "
    'YAML reads a bare off as false: write wandb: "off"',
}


@pytest.mark.parametrize(("content", "text"), RECIPES.items())
def test_bad_recipe_files(content: str, text: str, workdir) -> None:
    (workdir / "mine.yaml").write_text(content)
    with pytest.raises(ConfigError) as raised:
        check(compose("mine", GOOD, workdir).cfg)
    assert str(raised.value) == text.replace("{names}", names_with("mine"))


def test_recipe_that_is_not_yaml(workdir) -> None:
    (workdir / "mine.yaml").write_text("defaults: [base, _self_\nrun: {steps: 3}\n")
    with pytest.raises(ConfigError, match=r"^recipe mine: not valid YAML: while parsing a flow sequence in .*line 1, column 11 "):
        compose("mine", GOOD, workdir)


def test_unknown_recipe(workdir) -> None:
    with pytest.raises(ConfigError) as raised:
        compose("quikstart", GOOD)
    assert str(raised.value) == f"no recipe quikstart; there are {names_with()}; did you mean quickstart?"


def names_with(*own: str) -> str:
    return ", ".join(sorted([*own, *(path.stem for path in SHIPPED.glob("*.yaml"))]))
