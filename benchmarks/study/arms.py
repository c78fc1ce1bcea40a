"""What is compared: every arm of the accuracy study, how much it may train, and the budgets there are.

Every arm takes the same number of optimizer steps from the pre-trained model. Those that start from the fine-tuned
model share the dense training that made it, one for each seed, and train on for ``Budget.epochs``; those that their
papers start from the pre-trained model take the steps of both. A teacher is the fine-tuned model of the same seed, and
comes on top, as the papers have it.

Learning rates: an arm without ``tuned_as`` is trained with every rate of the budget's grid on the first seed, and goes
on with the one that is best on rows held out of the training set. An ablation takes the rate of the arm that it
ablates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparsebert.cli.recipes import Stage

# A stage that trains the model as it is.
FINE_TUNING = "fine-tuning"
FINE_TUNED, PRETRAINED, ONE_LAYER = "fine-tuned", "pre-trained", "one layer"
# Weight of the teacher's part, and temperature, where a paper has no distillation: those of movement pruning's code.
DISTILLATION, TEMPERATURE = 0.5, 2.0
DISTILLED = "+kd"


@dataclass(frozen=True)
class Budget:
    """``start_epochs`` make the fine-tuned model, ``epochs`` come after it; ``rates`` is the grid of every arm.

    ``bf16``: whether forward passes of the training compute in bfloat16 where that is safe; what is measured is
    float32. ``words``: whether the word embeddings, half of MiniLM, are trained; no arm prunes them, and movement
    pruning's published code freezes them as well.
    """

    name: str
    start_epochs: float
    epochs: float
    rates: tuple[float, ...]
    batch_size: int = 32
    max_length: int = 128
    bf16: bool = True
    words: bool = True


BUDGETS = {
    # For two CPU cores: a run on CoLA is one to two minutes where bfloat16 has instructions. Outside of this grid, 3e-5
    # leaves MiniLM near the majority class after two epochs of CoLA, and 3e-4 at it.
    "short": Budget("short", 2, 1, (5e-5, 1e-4, 2e-4), words=False),
    "full": Budget("full", 3, 3, (2e-5, 5e-5, 1e-4)),
}


@dataclass(frozen=True)
class Part:
    """One training of an arm, which takes ``share`` of its steps. ``target`` gives the format by the sparsity in per
    cent of the encoder's linear weights, and ``teacher`` whether the method itself learns from one."""

    method: str
    target: Callable[[int], str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    teacher: bool = False


@dataclass(frozen=True)
class Arm:
    """``baseline`` is the arm that it is held against, ``tuned_as`` the one whose learning rate it takes.

    ``distilled``: the loss of a paper without a teacher, half of it replaced by the divergence from one. ``trained``:
    False for pruning alone. ``probed``: its weights' ranks are measured at the end. ``projected``: its last step ends
    in a projection, and it is measured before that as well.
    """

    name: str
    about: str
    parts: tuple[Part, ...]
    sparsities: tuple[int, ...] = (50, 75)
    start: str = FINE_TUNED
    baseline: str | None = None
    tuned_as: str | None = None
    distilled: bool = False
    trained: bool = True
    probed: bool = False
    projected: bool = False

    @property
    def taught(self) -> bool:
        """Whether it needs a fine-tuned teacher."""
        return self.distilled or any(part.teacher for part in self.parts)

    def stages(self, sparsity: int, steps: int, rate: float, budget: Budget) -> tuple[Stage, ...]:
        """Its trainings, ``steps`` optimizer steps together."""
        ends = [round(steps * sum(part.share for part in self.parts[: i + 1])) for i in range(len(self.parts))]
        found = []
        for part, start, end in zip(self.parts, [0, *ends], ends, strict=False):
            found.append(
                Stage(
                    part.method,
                    None if part.target is None else part.target(sparsity),
                    options=part.options,
                    teacher=part.teacher,
                    steps=max(1, end - start),
                    batch_size=budget.batch_size,
                    max_length=budget.max_length,
                    lr=rate,
                    weight_decay=0.0,
                    distillation=DISTILLATION if self.distilled else 0.0,
                    temperature=TEMPERATURE,
                    group_by_length=True,
                )
            )
        return tuple(found)


def density(sparsity: int) -> float:
    return (100 - sparsity) / 100


def _groups(sparsity: int) -> str:
    found = {50: "2:4", 75: "1:4"}
    if sparsity not in found:
        raise ValueError(f"sparsity is {sparsity} %, expected {' or '.join(map(str, found))} for groups of four")
    return found[sparsity]


def _bitmap(sparsity: int) -> str:
    return f"bitmap:{density(sparsity):g}"


def _low_rank(sparsity: int) -> str:
    return f"low-rank:{density(sparsity):g}"


def _low_rank_rows(sparsity: int) -> str:
    # The published share of the low-rank part for BERT.
    return f"low-rank:0.05+rows:{density(sparsity) - 0.05:g}"


def _rows(sparsity: int) -> str:
    # A format without a low-rank part is no LoSparse: rank 1, which takes 0.4 % of MiniLM's encoder.
    return f"low-rank:r1+rows:{density(sparsity) - 0.004:g}"


def _dense(sparsity: int) -> str:
    return "dense"


# The descent ends where 30 % of the steps are left, whatever the method.
_DESCENT = {"start": "10%", "end": "30%"}
_WINDOW = {"start": "10%", "length": "60%"}


def _lpaf(prunes: str, **options: Any) -> tuple[Part, ...]:
    """The 30 % of the weights that the method ``prunes`` leaves, then their factors; half of the steps each."""
    return (
        Part(prunes, lambda sparsity: _bitmap(70), _DESCENT, share=0.5),
        Part("lpaf", _low_rank, options, share=0.5),
    )


def _knowledge(name: str, about: str, **more: Any) -> Arm:
    options = more.pop("options", {})
    # The paper's 95 %, and what so few steps can bear.
    given = {"start": PRETRAINED, "baseline": "gradual", "sparsities": (75, 95), **more}
    return Arm(name, about, (Part("knowledge", _bitmap, options, teacher=True),), **given)


_ARMS = (
    # What everything is held against.
    Arm(
        "dense", "no compression: the fine-tuned model, trained on for as long", (Part(FINE_TUNING),), (0,), probed=True
    ),
    Arm(
        "dense-pretrained",
        "no compression: all steps in one training",
        (Part(FINE_TUNING),),
        (0,),
        start=PRETRAINED,
        baseline="dense",
    ),
    Arm(
        "one-shot",
        "largest weights of each group, no training",
        (Part("magnitude", _groups),),
        trained=False,
    ),
    # Groups of four.
    Arm("magnitude", "largest weights of each group once, mask held", (Part("magnitude", _groups),)),
    Arm(
        "gradual-nm",
        "gradual magnitude in groups",
        (Part("gradual-magnitude", _groups, _DESCENT),),
        baseline="magnitude",
    ),
    Arm("admm", "ADMM, mask frozen after it", (Part("admm", _groups),), baseline="magnitude"),
    Arm(
        "admm-srste",
        "ADMM, SR-STE after it",
        (Part("admm", _groups, {"finish": "sr-ste"}),),
        baseline="magnitude",
    ),
    Arm(
        "admm-layers",
        "ADMM layer by layer from inputs, before any training",
        (Part("admm", _groups, {"input_moments": 32}),),
        baseline="magnitude",
    ),
    Arm(
        "seven-nm",
        "SEVEN in groups",
        (Part("seven", _groups, _WINDOW),),
        baseline="gradual-nm",
    ),
    # Anywhere in the matrix.
    Arm("gradual", "gradual magnitude", (Part("gradual-magnitude", _bitmap, _DESCENT),), (50, 75, 95)),
    Arm(
        "gradual-global",
        "gradual magnitude, one threshold for all matrices, as the scores below have it",
        (Part("gradual-magnitude", _bitmap, {**_DESCENT, "granularity": "global"}),),
        baseline="gradual",
    ),
    Arm("seven", "SEVEN, dynamic", (Part("seven", _bitmap, _WINDOW),), (50, 75, 90), baseline="gradual"),
    Arm(
        "taylor",
        "|W*G| of the last ten steps, the same schedule",
        (Part("platon", _bitmap, {**_DESCENT, "beta1": 0.0, "beta2": 1.0}),),
        baseline="gradual",
    ),
    Arm("platon", "PLATON", (Part("platon", _bitmap, {**_DESCENT, "beta2": 0.85}),), baseline="gradual"),
    Arm("movement", "movement pruning", (Part("movement", _bitmap, _DESCENT),), (50, 75, 90), baseline="gradual"),
    Arm("snip", "|W*G| of the first ten steps, once", (Part("snip", _bitmap),), baseline="gradual"),
    # Factors.
    Arm("svd", "truncated SVD, factors trained", (Part("svd", _low_rank),)),
    Arm("fwsvd", "SVD weighted by Fisher information", (Part("svd", _low_rank, {"rows": 32}),), baseline="svd"),
    Arm(
        "lpaf",
        "movement pruning to 30 %, sparsity-aware SVD, mixed-rank training",
        _lpaf("movement"),
        baseline="svd",
    ),
    Arm(
        "lpaf-magnitude",
        "LPAF with gradual magnitude in place of movement, which collapses in few steps",
        _lpaf("gradual-magnitude"),
        baseline="svd",
    ),
    Arm(
        "losparse",
        "LoSparse, from the fine-tuned model",
        (Part("losparse", _low_rank_rows, {"start": "5%", "end": "27%"}),),
        (50, 75, 90),
        baseline="svd",
    ),
    # As published: from the pre-trained model, with the steps of both trainings.
    _knowledge("knowledge", "knowledge-aware pruning", options={"updates": 100}),
    Arm(
        "seven-pretrained",
        "SEVEN from the pre-trained model, as published",
        (Part("seven", _bitmap, _WINDOW),),
        start=PRETRAINED,
        baseline="gradual",
    ),
    Arm(
        "losparse-pretrained",
        "LoSparse from the pre-trained model, as published",
        (Part("losparse", _low_rank_rows, {"start": "5%", "end": "27%"}),),
        start=PRETRAINED,
        baseline="svd",
    ),
    # Ablations.
    Arm(
        "admm-pull",
        "ADMM's first phase alone, then its projection",
        (Part("admm", _groups, {"admm": 1.0}),),
        tuned_as="admm",
        baseline="one-shot",
        projected=True,
    ),
    Arm(
        "admm-strong",
        "ADMM with thirty times the penalty, whose default is for thousands of steps",
        (Part("admm", _groups, {"rho": 3.0}),),
        tuned_as="admm",
        baseline="admm",
    ),
    Arm(
        "admm-strong-pull",
        "its first phase alone, then its projection",
        (Part("admm", _groups, {"rho": 3.0, "admm": 1.0}),),
        tuned_as="admm",
        baseline="admm-pull",
        projected=True,
    ),
    Arm(
        "admm-decoupled",
        "ADMM whose pull is a step of its own, which Adam does not bound to the learning rate",
        (Part("admm", _groups, {"decoupled": True, "rho": 1.0}),),
        tuned_as="admm",
        baseline="admm",
    ),
    Arm(
        "admm-decoupled-pull",
        "its first phase alone, then its projection",
        (Part("admm", _groups, {"decoupled": True, "rho": 1.0, "admm": 1.0}),),
        tuned_as="admm",
        baseline="admm-pull",
        projected=True,
    ),
    Arm(
        "admm-early",
        "ADMM in a fifth of the steps, which leaves more of them to the frozen mask",
        (Part("admm", _groups, {"admm": 0.2}),),
        tuned_as="admm",
        baseline="admm",
    ),
    Arm(
        "magnitude-bitmap",
        "largest weights of each matrix once, mask held",
        (Part("magnitude", _bitmap),),
        (75, 95),
        tuned_as="gradual",
        baseline="gradual",
    ),
    Arm(
        "seven-signed",
        "SEVEN with signed moments",
        (Part("seven", _bitmap, {**_WINDOW, "signed": True}),),
        tuned_as="seven",
        baseline="seven",
    ),
    Arm(
        "seven-summed",
        "SEVEN without the ratio of moments: summed |W*G|",
        (Part("seven", _bitmap, {**_WINDOW, "alpha1": 0.0, "alpha2": 0.0}),),
        tuned_as="seven",
        baseline="seven",
    ),
    Arm(
        "lpaf-plain",
        "LPAF with the plain SVD",
        _lpaf("movement", weighting="none"),
        tuned_as="lpaf",
        baseline="lpaf",
    ),
    Arm(
        "lpaf-magnitude-plain",
        "the same with the plain SVD",
        _lpaf("gradual-magnitude", weighting="none"),
        tuned_as="lpaf-magnitude",
        baseline="lpaf-magnitude",
    ),
    *(
        Arm(
            f"losparse-{name}",
            f"LoSparse, {about}",
            (Part("losparse", target, {"start": "5%", "end": "27%", **options}),),
            sparsities,
            tuned_as="losparse",
            baseline="losparse",
        )
        for name, about, target, options, sparsities in (
            ("rows", "the sparse part alone", _rows, {}, (50, 75, 90)),
            ("random", "random factors beside all of W", _low_rank_rows, {"init": "random"}, (75,)),
            ("random-residual", "random factors and the rest of W", _low_rank_rows, {"init": "random-residual"}, (75,)),
        )
    ),
    _knowledge(
        "knowledge-finetuned",
        "knowledge-aware pruning of the fine-tuned model",
        start=FINE_TUNED,
        tuned_as="knowledge",
        baseline="knowledge",
    ),
    *(
        _knowledge(
            f"knowledge-no-{term}",
            f"knowledge-aware pruning without the {term} term",
            options={"terms": [t for t in ("embedding", "hidden", "attention", "logits") if t != term]},
            tuned_as="knowledge",
            baseline="knowledge",
        )
        for term in ("hidden", "attention", "logits")
    ),
    Arm(
        "one-layer",
        "a dense student of one layer, 17 % of the encoder's weights, distilled",
        (Part(FINE_TUNING, _dense),),
        (95,),
        start=ONE_LAYER,
        distilled=True,
        tuned_as="dense-pretrained",
        baseline="knowledge",
    ),
    # What training leaves of the ranks.
    *(
        Arm(
            f"{name}-ranks",
            f"{about}, for its ranks",
            parts,
            (80, 90, 95),
            tuned_as=name,
            baseline=None if name == "gradual" else "gradual-ranks",
            probed=True,
        )
        for name, about, parts in (
            ("gradual", "gradual magnitude", (Part("gradual-magnitude", _bitmap, _DESCENT),)),
            ("movement", "movement pruning", (Part("movement", _bitmap, _DESCENT),)),
        )
    ),
)

# What a teacher adds where the paper has none.
_TAUGHT = (
    *("magnitude", "gradual-nm", "admm", "admm-srste", "admm-layers", "seven-nm", "gradual", "seven", "taylor"),
    *("platon", "movement", "snip", "svd", "fwsvd", "lpaf", "losparse"),
)


def _distilled(arm: Arm) -> Arm:
    baseline = arm.baseline and f"{arm.baseline}{DISTILLED}"
    return replace(
        arm,
        name=f"{arm.name}{DISTILLED}",
        about=f"{arm.about}; with a teacher, which the paper has not",
        sparsities=tuple(s for s in arm.sparsities if s in (50, 75)),
        distilled=True,
        baseline=baseline,
    )


ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}
ARMS |= {taught.name: taught for taught in (_distilled(ARMS[name]) for name in _TAUGHT)}


def pick(text: str | None) -> tuple[Arm, ...]:
    """The arms named, with commas, or all; ``ValueError`` for one that there is not."""
    names = list(ARMS) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ARMS:
            raise ValueError(f"arm is {name!r}, expected some of {', '.join(ARMS)}")
    return tuple(ARMS[name] for name in dict.fromkeys(names))
