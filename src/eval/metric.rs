//! What an answer is worth: each set's own evaluation, answer by answer.
//!
//! | metric | rule | source |
//! |---|---|---|
//! | `exact` | equal to a reference, both [normalised](super::normalise) | – |
//! | `vqa` | min(matches / 3, 1) over the other references, averaged over leaving each out | `TextVQAAccuracyEvaluator` in facebookresearch/mmf, in LLaVA `llava/eval/m4c_evaluator.py`; `vqaEval.py` in GT-Vision-Lab/VQA |
//! | `gqa` | equal without a final point, in lower case | GQA's `eval.py`, LLaVA's `scripts/convert_gqa_for_eval.py` |
//! | `pope` | *no* if the first sentence holds the word No, no or not, else *yes* | LLaVA's `llava/eval/eval_pope.py`, which is AoiDragon/POPE's `evaluate.py` |
//! | `mme` | yes or no in the first four letters, else neither | MME's `eval_tool/calculation.py` |
//! | `sqa` | the letter of a choice | LLaVA's `llava/eval/eval_science_qa.py` |
//!
//! POPE's precision, recall, F1 and share of yes, and MME's accuracy+ and score, are of many answers: [`Counts`] and
//! the table have them.

use std::collections::BTreeMap;

use super::dataset::Question;
use super::normalise::normalise;

/// How answers are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Equal after normalisation.
    Exact,
    /// Soft accuracy over several people's answers.
    Vqa,
    /// GQA's equality.
    Gqa,
    /// Yes or no, with precision and recall.
    Pope,
    /// Yes or no, in pairs of questions.
    Mme,
    /// The letter of a choice.
    Sqa,
}

impl Metric {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Exact,
        Self::Vqa,
        Self::Gqa,
        Self::Pope,
        Self::Mme,
        Self::Sqa,
    ];

    /// Its name in a data set.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Vqa => "vqa",
            Self::Gqa => "gqa",
            Self::Pope => "pope",
            Self::Mme => "mme",
            Self::Sqa => "sqa",
        }
    }

    /// The metric of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|metric| metric.name() == name)
    }

    /// Whether answers are yes and no.
    pub fn is_yes_no(self) -> bool {
        matches!(self, Self::Pope | Self::Mme)
    }

    /// What keeps the references of a question from being scored, if anything.
    pub fn refuses(self, question: &Question) -> Option<String> {
        let answers = &question.answers;
        match self {
            Self::Exact | Self::Gqa => None,
            Self::Vqa if answers.len() < 4 => Some(format!(
                "metric vqa needs the answers of four people or more (three of the others have to agree for full \
                 accuracy; VQA and TextVQA have ten), this question has {}",
                answers.len()
            )),
            Self::Vqa => None,
            Self::Pope | Self::Mme => {
                let right = |a: &String| matches!(a.to_lowercase().as_str(), "yes" | "no");
                (answers.len() != 1 || !answers.iter().all(right)).then(|| {
                    format!(
                        "metric {} needs the answer yes or no, this question has {}",
                        self.name(),
                        answers.join(", ")
                    )
                })
            }
            Self::Sqa => match (question.choices.len(), question.letter()) {
                (0, _) => Some("metric sqa needs `choices`".into()),
                (n, _) if n > LETTERS.len() => {
                    Some(format!("{n} choices; letters A to E name five at most"))
                }
                (_, Some(_)) => None,
                (n, None) => Some(format!(
                    "the answer '{}' is neither a letter of the {n} choices nor one of them",
                    answers.join(", ")
                )),
            },
        }
    }

    /// What an answer is worth, 0 to 1.
    pub fn score(self, question: &Question, answer: &str) -> f64 {
        let hit = match self {
            Self::Vqa => return soft(question, answer),
            Self::Exact => {
                let answer = normalise(answer);
                question.answers.iter().any(|a| normalise(a) == answer)
            }
            Self::Gqa => {
                let answer = answer.trim().trim_end_matches('.').to_lowercase();
                question.answers.contains(&answer)
            }
            Self::Pope => Some(pope(answer)) == question.yes(),
            Self::Mme => mme(answer).is_some_and(|yes| Some(yes) == question.yes()),
            Self::Sqa => {
                let picked = letter(answer).filter(|at| *at < question.choices.len());
                picked.is_some() && picked == question.letter()
            }
        };
        f64::from(u8::from(hit))
    }

    /// Yes or no as the metric reads an answer; none where it says neither.
    pub fn reads(self, answer: &str) -> Option<bool> {
        match self {
            Self::Pope => Some(pope(answer)),
            Self::Mme => mme(answer),
            _ => None,
        }
    }
}

const LETTERS: [char; 5] = ['A', 'B', 'C', 'D', 'E'];

impl Question {
    /// Whether the reference is yes, where it is yes or no.
    pub fn yes(&self) -> Option<bool> {
        match self.answers.first()?.to_lowercase().as_str() {
            "yes" => Some(true),
            "no" => Some(false),
            _ => None,
        }
    }

    /// Index of the right choice: a letter, or the choice itself.
    pub fn letter(&self) -> Option<usize> {
        let answer = self.answers.first()?.trim();
        let named = LETTERS.iter().position(|l| l.to_string() == answer);
        named
            .filter(|at| *at < self.choices.len())
            .or_else(|| self.choices.iter().position(|c| c.trim() == answer))
    }
}

fn soft(question: &Question, answer: &str) -> f64 {
    let answer = normalise(answer);
    let all = question.answers.len();
    let same = question.answers.iter().filter(|a| normalise(a) == answer);
    let same = same.count();
    // Of the `all` ways to leave one out, `same` leave out one that agrees.
    let worth = |matches: usize| (matches as f64 / 3.0).min(1.0);
    let agreeing = same as f64 * worth(same.saturating_sub(1));
    (agreeing + (all - same) as f64 * worth(same)) / all as f64
}

fn pope(answer: &str) -> bool {
    let first = answer.split('.').next().unwrap_or_default();
    let first = first.replace(',', "");
    let mut words = first.split(' ');
    !words.any(|word| matches!(word, "No" | "not" | "no"))
}

fn mme(answer: &str) -> Option<bool> {
    let answer = answer.to_lowercase();
    let start: String = answer.chars().take(4).collect();
    match (start.contains("yes"), start.contains("no")) {
        (true, _) => Some(true),
        (false, true) => Some(false),
        (false, false) => None,
    }
}

/// Index of the choice that an answer names.
fn letter(answer: &str) -> Option<usize> {
    let text = answer.replace('\n', ". ");
    let at = |c: char| LETTERS.iter().position(|letter| *letter == c);
    let mut own = text.trim().chars();
    if let (Some(only), None) = (own.next(), own.next())
        && let Some(found) = at(only)
    {
        return Some(found);
    }
    let mut start = text.chars();
    if let (Some(first), Some('.'), Some(' ')) = (start.next(), start.next(), start.next())
        && let Some(found) = at(first)
    {
        return Some(found);
    }
    const SAYS: &str = "The answer is ";
    let named = |point: bool| {
        text.match_indices(SAYS).find_map(|(found, _)| {
            let mut rest = text[found + SAYS.len()..].chars();
            let letter = rest.next().and_then(at)?;
            (!point || rest.next() == Some('.')).then_some(letter)
        })
    };
    named(true).or_else(|| named(false))
}

/// Of yes and no: how often each was right and wrong.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Yes, rightly.
    pub true_yes: usize,
    /// Yes, wrongly.
    pub false_yes: usize,
    /// No, rightly.
    pub true_no: usize,
    /// No, wrongly.
    pub false_no: usize,
    /// Neither.
    pub other: usize,
}

impl Counts {
    /// Counts an answer that was read, against the reference.
    pub fn add(&mut self, read: Option<bool>, right: bool) {
        let place = match (read, right) {
            (Some(true), true) => &mut self.true_yes,
            (Some(true), false) => &mut self.false_yes,
            (Some(false), false) => &mut self.true_no,
            (Some(false), true) => &mut self.false_no,
            (None, _) => &mut self.other,
        };
        *place += 1;
    }

    /// `precision`, `recall`, `f1` and `yes_ratio`; what has no denominator is left out.
    pub fn rates(&self) -> BTreeMap<&'static str, f64> {
        let mut rates = BTreeMap::new();
        let mut put = |name, of: usize, among: usize| {
            if among > 0 {
                rates.insert(name, of as f64 / among as f64);
            }
        };
        let said = self.true_yes + self.false_yes;
        let all = said + self.true_no + self.false_no + self.other;
        put("precision", self.true_yes, said);
        put("recall", self.true_yes, self.true_yes + self.false_no);
        put("yes_ratio", said, all);
        // 2·p·r / (p + r) with the denominators multiplied out.
        let f1 = 2 * self.true_yes + self.false_yes + self.false_no;
        put("f1", 2 * self.true_yes, f1);
        rates
    }
}

#[cfg(test)]
mod tests;
