"""Words that several patterns share, as parts of regular expressions. Pure."""

from __future__ import annotations

from typing import Final

__all__ = [
    "BE",
    "CONDITIONS",
    "DAY_NAME",
    "DIETS",
    "HABIT",
    "ILLNESSES",
    "INSTRUCTION",
    "LANGUAGES",
    "MONTH",
    "NUMBER_WORDS",
    "OCCUPATIONS",
    "OWNED",
    "SOFTWARE",
    "V",
]

V = r"(?P<v>[^,;()\n※]{1,90})"
"""The value: up to the next mark that ends a phrase."""
BE = r"(?:am|is|are|was|were)"
NUMBER_WORDS: Final = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|"
    "nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
)
LANGUAGES: Final = (
    "English|German|French|Spanish|Portuguese|Italian|Dutch|Polish|Czech|Russian|Ukrainian|Turkish|Arabic|Hebrew|Hindi|"
    "Urdu|Bengali|Tamil|Japanese|Korean|Chinese|Mandarin|Cantonese|Vietnamese|Thai|Swedish|Norwegian|Danish|Finnish|"
    "Greek|Hungarian|Romanian|Bulgarian|Croatian|Serbian|Slovak|Catalan|Basque|Irish|Welsh|Persian|Farsi|Indonesian|"
    "Malay|Swahili"
)
OCCUPATIONS: Final = (
    "nurse|doctor|physician|surgeon|dentist|vet|veterinarian|pharmacist|paramedic|midwife|therapist|psychologist|teacher|"
    "professor|lecturer|tutor|student|researcher|scientist|physicist|chemist|biologist|mathematician|statistician|"
    "economist|engineer|developer|programmer|architect|designer|analyst|administrator|consultant|accountant|auditor|"
    "banker|lawyer|attorney|solicitor|paralegal|judge|journalist|editor|writer|author|translator|librarian|photographer|"
    "musician|pianist|painter|actor|actress|director|producer|chef|cook|baker|barista|waiter|waitress|bartender|butcher|"
    "farmer|gardener|florist|carpenter|plumber|electrician|mechanic|welder|builder|driver|pilot|sailor|soldier|"
    "firefighter|policeman|police officer|officer|manager|founder|co-founder|entrepreneur|freelancer|contractor|"
    "recruiter|salesman|salesperson|hairdresser|tailor|secretary|receptionist|intern|apprentice|trainee|CEO|CTO|CFO|COO|"
    "VP|product owner|scrum master|data engineer|sysadmin|DBA|SRE|postdoc|PhD student|social worker|realtor|"
    "estate agent|landlord|pensioner|retiree"
)
ILLNESSES: Final = (
    "asthma|diabetes|epilepsy|migraines?|arthritis|dyslexia|ADHD|celiac disease|coeliac disease|high blood pressure|"
    "hypertension|insomnia|tinnitus|Crohn's(?: disease)?|IBS|anxiety|depression|a pacemaker|a heart condition|hay fever"
)
CONDITIONS: Final = (
    "diabetic|asthmatic|colou?r[- ]?blind|deaf|blind|pregnant|epileptic|dyslexic|autistic|hard of hearing|coeliac|"
    "celiac|anaemic|anemic|visually impaired|in a wheelchair|a wheelchair user"
)
DIETS: Final = (
    "vegan|vegetarian|pescatarian|pescetarian|keto|kosher|halal|gluten[- ]free|teetotal|teetotaller|flexitarian"
)
OWNED: Final = (
    "kids?|children|child|sons?|daughters?|siblings?|brothers?|sisters?|dogs?|cats?|horses?|rabbits?|hamsters?|parrots?|"
    "chickens|pets?|cars?|bikes?|motorbikes?|motorcycles?|vans?|boats?|houses?|flats?|apartments?|gardens?|"
    "grandchildren|twins|piano|guitar|violin|driving licen[cs]e|mortgage|allotment|cottage"
)
HABIT: Final = (
    "take|drink|eat|get up|wake up|wake|go|work|run|walk|cycle|swim|buy|deploy|travel|fly|drive|read|cook|sleep|pay|"
    "wear|smoke|train|meet|start my|start work|order|book|shop|ship|release|test|review|write|commute|meditate|skip|"
    "have breakfast|have lunch|have dinner|play|watch|listen|study|practi[sc]e"
)
INSTRUCTION: Final = (
    "use|add|write|include|call|say|start|end|explain|apologi[sz]e|ask|mention|put|give|show|format|keep|answer|reply|"
    "respond|address|translate|summari[sz]e|quote|cite|send|suggest|recommend|make|speak|talk|be|assume"
)
DAY_NAME = (
    r"(?:monday|tuesday|wednesday|thursday|friday|saturday|sunday|weekend|weekday|day|week|month|morning|evening|night|"
    r"year|summer|winter)"
)
MONTH: Final = "January|February|March|April|May|June|July|August|September|October|November|December"
SOFTWARE: Final = (
    r"\d|\b(?:Linux|Ubuntu|Debian|Windows|Mac|macOS|Android|iOS|iPhone|Python|Java|JavaScript|TypeScript|Rust|Go|Kotlin|"
    r"Swift|React|Vue|Angular|Svelte|Django|Rails|AWS|Azure|GCP|Kubernetes|Docker|Terraform|Ansible|Slack|Teams|Zoom|"
    r"Discord|Telegram|Signal|WhatsApp|Notion|Jira|Trello|GitHub|GitLab|Bitbucket|Vim|Neovim|Emacs|VS ?Code|Cursor|"
    r"Postgres\w*|MySQL|MongoDB|Redis|Kafka|Chrome|Firefox|Safari|Twitter|Facebook|Instagram|LinkedIn|Reddit|Mastodon|"
    r"Netflix|Spotify)\b"
)
"""What people move to and join without changing home or employer; a number is a version."""
