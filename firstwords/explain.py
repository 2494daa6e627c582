"""The settings of a run -> each in plain words: its value, where that comes from, what it does here.

    --batch_size 8  (from the recipe)  rows in a micro-batch
        8 rows go through the model at once. It fills the memory ...

Invariant: what a flag means in general stands in `args.TrainFlags` alone; the words here add what it does to
the run at hand, and each flag has some.
"""

from dataclasses import fields
from textwrap import wrap

from firstwords.args import CHOSEN_BY_TOKENS, TrainFlags
from firstwords.opening import Opened
from firstwords.trainer import RunMeta, rows_per_step

WORDS = {
    "data_dir": "Its rows are read in an order that the seed alone decides.",
    "model_dir": "Everything of the run lies there; the same command goes on from there.",
    "init_model_dir": "The weights begin as what that run has learned; without it they begin random.",
    "cfg": "The shape of the network, here of {parameters:,} weights.",
    "recipe": "What the command line does not say is read from it.",
    "seq_len": "The model sees no further back than {seq_len} tokens while it learns. Attention costs by the "
    "square of it, all else in proportion.",
    "batch_size": "{batch_size} rows go through the model at once. It fills the memory and keeps the device "
    "busy; what is learned stays the same as long as its product with --grad_accum does.",
    "grad_accum": "The gradients of {grad_accum} micro-batches are added before a step, so that a step is "
    "taken on {rows} rows, {tokens:,.0f} tokens.",
    "lr": "How far a step goes. Too high, and the loss jumps or becomes NaN; too low, and steps are wasted. "
    "What is right depends on the optimizer: about 1e-3 for AdamW on small models, 1e-2 for Muon.",
    "warmup_steps": "The rate climbs over the first {warmup}: the first gradients of a network, and the "
    "averages of them, are not to be trusted yet.",
    "max_steps": "This run takes {steps}, and the schedule of the rate is laid out over them.",
    "epochs": "In this run the data are read {epochs}.",
    "hours": "The schedule then follows the clock, over all lives of the run.",
    "weight_decay": "Each step draws those weights towards zero by {weight_decay:g} times the rate: what no "
    "gradient speaks for fades.",
    "bf16": "Here products are computed {precision}; the weights themselves stay in float32.",
    "log_steps": "Each line is the mean of that many steps.",
    "save_steps": "That much work a power cut can cost at most.",
    "eval_steps": "Then the whole val set is read, samples are drawn and questions asked.",
    "save_total_limit": "An older one is deleted when enough newer ones are whole.",
    "assistant_only_loss": "Here the loss is taken on {loss_on}.",
    "overlong": "What does not fit a row of {seq_len} tokens is left out, or loses its end.",
    "optim": "It turns gradients into a step. AdamW keeps two averages of each weight; muon makes the "
    "directions of a matrix alike in size, normuon its neurons too, and they learn more from a token; "
    "adamw_bnb_8bit keeps AdamW's averages in 8 bits, but for those of the embeddings.",
    "muon_momentum": "Higher, and a step follows more gradients and later; lower suits small batches. Other "
    "optimizers do not read it.",
    "lr_scheduler_type": "cosine falls in half a wave over the whole run; warmup_stable_decay stays high and "
    "falls at the end.",
    "decay_steps": "Here {decay}. A cooldown, asked for by touch COOLDOWN in the run folder, takes the same "
    "share of the steps before it.",
    "min_lr_ratio": "0 makes the last steps as small as can be, which ends at the lowest loss.",
    "tokenizer": "Data of our prep scripts bring their own.",
    "attention": "Conversations in a row never see one another, whichever is taken; they differ in speed.",
    "device": "It is never another one than what was asked for.",
    "seed": "The same seed, data and flags give the same run on one machine, {sameness}.",
    "on_nan": "Either way no step is taken on it.",
    "max_rollbacks": "When there are more, the fault is not in the data.",
    "resume": "A run that was stopped and gone on with ends as one that was not, {sameness}.",
    "allow_change": "Without it a run goes on with the flags that it was begun with, or not at all.",
    "sample_prompts": "So one sees it learn; without a file the prompts come from the val set.",
    "keep_text": "Where that loss rises, the model forgets what it has read.",
    "eval_tasks": "To compare with other models; small ones stay at chance.",
    "hellaswag_data": "It is read only when --eval_tasks asks for it.",
    "report_to": "The same curves, on a service of your choice.",
    "preflight": "It also says what would fit, when this does not.",
    "explain": "This page is its work.",
    "vram_gb": "A run that would take more is refused before it begins, with a setting that would fit.",
    "batch_tokens": "What a step learns from, whatever memory there is.",
    "recompute": "Less memory for more time; the numbers stay the same, {sameness}.",
    "debug": "For whoever wants to find where it was raised.",
}

ORIGINS = {
    "flag": "from the command line",
    "recipe": "from the recipe",
    "tokens": "chosen for --batch_tokens",
    "auto": "chosen by auto",
    "default": "default",
}


def explain(
    flags: TrainFlags, extra: dict, origins: dict[str, str], opened: Opened, meta: RunMeta
) -> list[str]:
    """Return the page, as lines.

    Args:
        flags: of the run.
        extra: fields of `TrainingArguments` beside them.
        origins: name of a flag -> a key of `ORIGINS`; the others are defaults, or not given.
        opened: what the run is made of.
        meta: of the run.
    """
    facts = vars(flags) | gather_facts(flags, opened, meta)
    lines = []
    for spec in fields(TrainFlags):
        value, meaning = getattr(flags, spec.name), spec.metadata["help"]
        words = WORDS[spec.name].format(**facts)
        if value in (None, ""):
            lines.append(f"--{spec.name}  (not given)  {meaning}")
        else:
            origin = ORIGINS[origins.get(spec.name, "default")]
            lines.append(f"--{spec.name} {value}  ({origin})  {meaning}")
        lines += [f"    {line}" for line in wrap(words, 96)]
    for name, value in sorted(extra.items()):
        lines.append(f"--{name} {value}  (given)  a field of transformers.TrainingArguments, explained there")
    return lines


def mark_choices(flags: TrainFlags, origins: dict[str, str]) -> dict[str, str]:
    """Return the origins, with what is going to be chosen for this machine: asked before it is."""
    chosen = {"device": "auto"} if flags.device == "auto" else {}
    if flags.batch_tokens is not None:
        chosen |= dict.fromkeys(CHOSEN_BY_TOKENS, "tokens")
    return origins | chosen


def gather_facts(flags: TrainFlags, opened: Opened, meta: RunMeta) -> dict:
    """Return what the sentences name beside the flags, see `WORDS`."""
    steps, hours = opened.max_steps, flags.hours
    epochs = steps * meta.tokens_per_step / opened.tokens_per_epoch
    return {
        "rows": rows_per_step(flags),
        "tokens": meta.tokens_per_step,
        "steps": f"steps for {hours:g} hours" if hours else f"{steps:,} steps",
        "epochs": "as often as the hours allow" if hours else f"{epochs:.3g} times",
        "parameters": opened.model.num_parameters(),
        "warmup": say_share(flags.warmup_steps, flags),
        "decay": say_share(flags.decay_steps, flags),
        "precision": "in bfloat16" if flags.bf16 else "in float32",
        "sameness": say_sameness(flags.device),
        "loss_on": "what the assistant says" if flags.assistant_only_loss else "every token",
    }


def say_share(steps: float, flags: TrainFlags) -> str:
    """Return a part of the schedule in words."""
    whole = "the hours" if flags.hours else "all steps"
    return f"{steps:g} steps" if steps >= 1 else f"{steps:.3g} of {whole}"


def say_sameness(device: str) -> str:
    """Return how much alike two runs are that should be: what was tried, and no more."""
    return "bit for bit" if device == "cpu" else "on a CPU bit for bit; on a GPU it was not tried"
