"""List the distillation objectives, the erasers and the attacks, each with its paper."""

from __future__ import annotations

from sublimate.training import registry

KINDS = {
    "Objectives (method in `sublimate distill`)": "sublimate.training.objectives",
    "Erasers (method in `sublimate erase`)": "sublimate.erasure.methods",
    "Attacks (attack in `sublimate audit`)": "sublimate.evaluation.attacks",
}


def command() -> None:
    """List the distillation objectives, the erasers and the attacks, each with its paper (an arXiv id)."""
    tables = {
        title: [registry.card(package, name) for name in registry.available(package)]
        for title, package in KINDS.items()
    }
    cards = [card for table in tables.values() for card in table]
    name_width = max(len(card.name) for card in cards)
    paper_width = max(len(card.paper) for card in cards)
    for title, table in tables.items():
        print(f"{title}:")
        for card in table:
            print(f"  {card.name:{name_width}}  {card.paper:{paper_width}}  {card.summary}")
        print()
