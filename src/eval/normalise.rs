//! Answers made alike before they are compared: case, punctuation, number words, articles, contractions.
//!
//! These are the rules of VQA's evaluation server (`EvalAIAnswerProcessor` in facebookresearch/mmf,
//! `pythia/tasks/processors.py`, which `llava/eval/m4c_evaluator.py` carries), its oddities included: they decide
//! what published numbers are. `vqaEval.py` of GT-Vision-Lab/VQA is the older form of them, with a shorter list of
//! marks.

use std::collections::HashMap;
use std::sync::LazyLock;

/// Marks that go: to nothing where one of them stands beside a space, else to a space.
const MARKS: [char; 21] = [
    ';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',',
    '?', '!',
];

const ARTICLES: [&str; 3] = ["a", "an", "the"];

const NUMBERS: [(&str, &str); 12] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];

/// Contractions that are put right. Any of these words is recognised with one of its apostrophes left out
/// (`shouldnt've`, `shouldn'tve`). The server's list also has four words with a capital I, which no lower-case text
/// matches.
const CONTRACTIONS: &str = "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't \
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't \
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've \
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's \
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll \
    they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's \
    where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all \
    y'all'll y'all'd've you'd you'd've you'll you're you've";

/// Of the server's list, the entry that goes the other way.
const REVERSED: (&str, &str) = ("somebody'd", "somebodyd");

static CONTRACTED: LazyLock<HashMap<String, &str>> = LazyLock::new(|| {
    let mut table = HashMap::from([(REVERSED.0.to_owned(), REVERSED.1)]);
    for word in CONTRACTIONS.split_whitespace() {
        for (at, _) in word.match_indices('\'') {
            table.insert(format!("{}{}", &word[..at], &word[at + 1..]), word);
        }
    }
    table
});

/// Points that are taken out at most: the server gives `re.UNICODE`, 32, where Python expects a count.
const MOST_POINTS: usize = 32;

/// An answer as VQA's evaluation compares it.
pub fn normalise(answer: &str) -> String {
    let text = answer.to_lowercase();
    let text = text
        .replace([',', '?'], "")
        .replace("'s", " 's")
        .trim()
        .replace(['\n', '\t'], " ");
    words(&points(&marks(text.trim())))
}

/// Whether a mark goes to nothing or to a space is decided on the text as it was.
fn marks(text: &str) -> String {
    let beside_space = |mark: char| {
        let mut last = None;
        text.chars().any(|c| {
            let found = (last == Some(mark) && c == ' ') || (last == Some(' ') && c == mark);
            last = Some(c);
            found
        })
    };
    let glued: Vec<bool> = MARKS.iter().map(|mark| beside_space(*mark)).collect();
    text.chars()
        .filter_map(|c| match MARKS.iter().position(|mark| *mark == c) {
            Some(mark) if glued[mark] => None,
            Some(_) => Some(' '),
            None => Some(c),
        })
        .collect()
}

/// Points that no digit follows go.
fn points(text: &str) -> String {
    let mut taken = 0;
    let mut rest = text.chars().peekable();
    let mut kept = String::with_capacity(text.len());
    while let Some(c) = rest.next() {
        let digit = rest.peek().is_some_and(|next| next.is_ascii_digit());
        if c == '.' && !digit && taken < MOST_POINTS {
            taken += 1;
        } else {
            kept.push(c);
        }
    }
    kept
}

fn words(text: &str) -> String {
    let number = |word: &str| {
        let found = NUMBERS.iter().find(|(name, _)| *name == word);
        found.map_or_else(|| word.to_owned(), |(_, digits)| (*digits).to_owned())
    };
    let words = text.split_whitespace().map(number);
    let words = words.filter(|word| !ARTICLES.contains(&word.as_str()));
    let words = words.map(|word| match CONTRACTED.get(&word) {
        Some(right) => (*right).to_owned(),
        None => word,
    });
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the server's own code gives, recorded by running it.
    #[test]
    fn answers_are_made_alike_as_the_evaluation_server_does() {
        for (answer, expected) in RECORDED {
            assert_eq!(normalise(answer), *expected, "{answer:?}");
        }
    }

    const RECORDED: &[(&str, &str)] = &[
        ("Red", "red"),
        ("The red one.", "red 1"),
        ("a  dog", "dog"),
        ("An apple, a pear", "apple pear"),
        ("two", "2"),
        ("Twenty-two", "twenty 2"),
        ("1,000", "1000"),
        ("3.14", "3.14"),
        ("3.", "3"),
        ("no!", "no"),
        ("yes / no", "yes no"),
        ("yes/no", "yes no"),
        ("T-shirt", "t shirt"),
        ("left - right", "left right"),
        ("don't", "don't"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("Dog's", "dog 's"),
        ("what?", "what"),
        ("10:30", "10:30"),
        ("U.S.A.", "usa"),
        ("$5.00", "$5.00"),
        ("hello\nworld", "hello world"),
        ("\ttab ", "tab"),
        ("shouldn'tve", "shouldn't've"),
        ("somebody'd", "somebodyd"),
        ("(none)", "0"),
        ("\"stop\"", "stop"),
        ("a", ""),
        ("", ""),
        ("x_y", "x y"),
        ("C++", "c"),
        ("50%", "50%"),
        ("it's", "it 's"),
        ("its", "its"),
        ("'twas", "'twas"),
        ("twas", "'twas"),
        ("yall'd've", "y'all'd've"),
        ("Coca-Cola ", "coca cola"),
        ("e.g. this", "eg this"),
        ("..5", ".5"),
        ("........................................", "........"),
        ("1.. 2", "1 2"),
        ("½.", "½"),
        ("New York, NY", "new york ny"),
        ("I'm", "i'm"),
        ("im", "im"),
        ("9-11 -", "911"),
        ("half [1/2]", "half 1 2"),
        ("über", "über"),
    ];
}
