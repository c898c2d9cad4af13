"""The page on which compliance staff read flagged conversations and accept, reject or correct each verdict.

One file without network: transcripts stand in it as inert JSON and reach the screen as text nodes only, and the page's security
policy allows its one script, by its hash. Decisions are kept in the browser (localStorage, by the hash of what was checked and of
each conversation) and downloaded as JSON lines for `tools.review import`. The list draws only the rows in sight, so that ten
thousand conversations filter at once.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from swallow_jax import check, verdict_script
from swallow_jax.figures import Html, document, h
from swallow_jax.task import Task

Row = Mapping[str, Any]


def build(
    task: Task, verdicts: Sequence[Row], talks: Mapping[str, Row], *, key: str, name: str, checked: int
) -> str:  # fmt: skip
    """The page's HTML. `talks`: conversations by id; `key` names this check in the browser; `checked`: how many it read."""
    content = _content(task, verdicts, talks) | {"key": key, "name": name, "checked": checked, "words": _WORDS}
    inert = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        inert = inert.replace(character, f"\\u{ord(character):04x}")
    body = [
        h("noscript", h("p", "This page needs its script. / このページの表示にはスクリプトが必要です。")),
        Html('<div id="app"></div>'),
        Html(f'<script type="application/json" id="data">{inert}</script>'),
        Html(f"<script>{verdict_script.SCRIPT}</script>"),
    ]
    digest = base64.b64encode(hashlib.sha256(verdict_script.SCRIPT.encode()).digest()).decode()
    title = f"{_WORDS[_language(task)]['title']}: {task.id}"
    return document(title, body, style=verdict_script.STYLE, scripts=[f"sha256-{digest}"])


def _language(task: Task) -> str:
    return "ja" if task.language == "ja" else "en"


def _content(task: Task, verdicts: Sequence[Row], talks: Mapping[str, Row]) -> dict[str, Any]:
    places = {category.id: number for number, category in enumerate(task.categories)}
    speakers = {speaker: number for number, speaker in enumerate(task.speakers)}
    rules: dict[str, int] = {}  # each legal basis once, by its JSON

    def rule(basis: Mapping[str, Any]) -> int:
        return rules.setdefault(json.dumps(basis, ensure_ascii=False), len(rules))

    items = [
        {
            "id": v["conversation_id"], "sha": v["input_sha256"], "verdict": v["verdict"], "score": v["score"],
            "audit": bool(v.get("audit")), "date": v.get("date"),
            "turns": [[speakers[turn["speaker"]], turn["text"]] for turn in talks[v["conversation_id"]]["turns"]],
            "found": [
                {
                    "c": places[x["category"]], "score": x["score"], "why": x["rationale"], "missing": x["missing_items"],
                    "quotes": [[e["turn"], e["quote"], e.get("drop")] for e in x["evidence"]],
                    "rules": [rule(basis) for basis in x["legal_basis"]],
                }
                for x in v["violations"]
            ],
            "required": [[item["item"], item["status"]] for item in v["required_items"]],
        }
        for v in sorted(verdicts, key=check.urgency)
    ]  # fmt: skip
    return {
        "language": _language(task), "several": task.label_policy == "multi", "speakers": list(task.speakers),
        "model": verdicts[0]["model"] if verdicts else "", "taxonomy": task.version, "items": items,
        "rules": [json.loads(text) for text in rules], "notes": list(task.notes),
        "categories": [
            {"id": c.id, "ja": c.name_ja, "en": c.name_en, "kind": c.kind, "definition": c.definition,
             "required": list(c.required_items)}
            for c in task.categories
        ],
    }  # fmt: skip


_WORDS = {
    "ja": {
        "title": "判定の確認", "other": "English", "reviewer": "確認者", "reviewer_hint": "氏名または社員番号",
        "download": "判定結果を保存", "load": "読み込む", "help": "操作", "status": "状態", "kind": "判定",
        "category": "区分", "order": "並び順", "search": "語句で絞り込む", "all": "すべて", "open": "未確認",
        "done": "確認済み", "accepted": "承認", "rejected": "却下", "corrected": "修正", "violation": "違反の疑い",
        "needs_review": "要確認", "no_violation": "違反なし", "audit": "抽出監査", "by_score": "確率の高い順",
        "by_file": "会話番号順", "count": "件", "score": "違反の確率", "nothing": "この条件に合う会話はありません。",
        "no_finding": "違反の指摘はありません。",
        "audit_note": "抽出監査：見落としの割合を推定するために、違反なしの会話から無作為に選ばれました。",
        "invalid": "モデルの回答から判定を読み取れませんでした。会話を読んで判定してください。", "evidence": "根拠となる発言",
        "missing": "説明がなかった事項", "legal": "根拠条文", "no_rule": "この日に有効な根拠条文が登録されていません。",
        "from": "施行", "to": "まで", "rationale": "理由", "required": "説明事項", "explained": "説明あり",
        "not_applicable": "対象外", "missing_status": "説明なし", "conversation": "会話", "accept": "承認",
        "reject": "却下", "reject_hint": "違反なしとする", "confirm": "違反なしで確定", "correct": "修正", "save": "修正を保存",
        "cancel": "やめる", "undo": "取り消す", "reason": "理由", "reason_needed": "理由を入力してください",
        "reviewer_needed": "先に確認者を入力してください", "compliant": "違反なし", "which": "正しい区分",
        "which_missing": "説明がなかった事項", "which_evidence": "根拠となる発言", "add": "根拠に追加", "remove": "外す",
        "add_hint": "会話の語句を選択するか、発言のボタンを押すと追加されます。", "back": "一覧へ", "decided": "確認済み",
        "saved_here": "判定はこのブラウザーに保存されます。終わったら「判定結果を保存」でファイルにしてください。",
        "not_saved": "このブラウザーには保存できません。閉じる前に必ず「判定結果を保存」してください。",
        "loaded": "件を読み込みました", "checked": "件を点検", "close": "閉じる", "drop": "除くと下がる確率",
        "keys_title": "キー操作",
        "keys": [
            ["J / ↓、K / ↑", "次の会話、前の会話"], ["A", "承認（指摘がない会話では違反なしで確定）"],
            ["R", "却下：理由を入力して Enter"], ["C", "修正"], ["U", "判定を取り消す"], ["E", "次の根拠へ移動"],
            ["/", "語句で絞り込む"], ["L", "表示言語の切り替え"], ["Esc", "入力から戻る"], ["?", "この説明"],
        ],
        "confidential": "このファイルには会話の内容が含まれます。取り扱いに注意してください。判断を"
        "下すのは確認者であり、モデルではありません。",
    },
    "en": {
        "title": "Verdicts to review", "other": "日本語", "reviewer": "Reviewer", "reviewer_hint": "name or staff number",
        "download": "Download", "load": "Load", "help": "Keys", "status": "Status",
        "kind": "Verdict", "category": "Category", "order": "Order", "search": "Words", "all": "all", "open": "undecided",
        "done": "decided", "accepted": "accepted", "rejected": "rejected", "corrected": "corrected", "violation": "violation",
        "needs_review": "needs review", "no_violation": "no violation", "audit": "audit sample",
        "by_score": "highest score first", "by_file": "by id", "count": "", "score": "score",
        "nothing": "No conversation fits these filters.", "no_finding": "Nothing was found.",
        "audit_note": "Audit sample: drawn at random from the conversations without a finding, to estimate what is missed.",
        "invalid": "The model's answer could not be read. Please read the conversation and decide.", "evidence": "Evidence",
        "missing": "Left unsaid", "legal": "Legal basis", "no_rule": "The task's table holds no rule in force on that day.",
        "from": "in force from", "to": "until", "rationale": "Reason given", "required": "Required items",
        "explained": "explained", "not_applicable": "does not apply", "missing_status": "not explained",
        "conversation": "Conversation", "accept": "Accept", "reject": "Reject", "reject_hint": "there is no violation",
        "confirm": "Confirm: no violation", "correct": "Correct", "save": "Save correction", "cancel": "Cancel",
        "undo": "Undo", "reason": "Reason", "reason_needed": "please give a reason",
        "reviewer_needed": "please say first who reviews", "compliant": "no violation", "which": "Right category",
        "which_missing": "Left unsaid", "which_evidence": "Evidence", "add": "add as evidence", "remove": "remove",
        "add_hint": "Select words in the conversation, or press a turn's button, to add them.", "back": "List",
        "decided": "decided", "saved_here": "Decisions are kept in this browser. When done, download them as a file.",
        "not_saved": "This browser keeps nothing. Download the decisions before you close the page.",
        "loaded": "decisions loaded", "checked": "conversations checked", "close": "Close",
        "drop": "probability lost without it", "keys_title": "Keys",
        "keys": [
            ["J / ↓, K / ↑", "next, previous conversation"], ["A", "accept (without a finding: confirm no violation)"],
            ["R", "reject: give a reason, Enter"], ["C", "correct"], ["U", "undo the decision"],
            ["E", "go to the next evidence"], ["/", "search words"], ["L", "switch the language"], ["Esc", "leave a field"],
            ["?", "this help"],
        ],
        "confidential": "This file holds the conversations: handle it accordingly. The reviewer decides, not the model.",
    },
}  # fmt: skip
