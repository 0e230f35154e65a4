//! Which tokens of a question are salient, for `text: salient`.
//!
//! The method asks for question words, nouns, verbs, adjectives, adverbs and `?` `!` `:`, without stop words,
//! and always the last token. There is no part-of-speech tagger here: every word counts that is not in a list
//! of English stop words (articles, pronouns, prepositions, conjunctions, auxiliaries, particles), plus the
//! question words. That takes in numbers, which a tagger would leave out, and treats every word of another
//! language as salient.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::LazyLock;

/// Words that carry structure, not content. Question words are missing on purpose.
const STOP_WORDS: &str = "
    a about above after again against ain't all also am an and any are aren't as at be because
    been before being below between both but by can can't cannot could couldn't did didn't do
    does doesn't doing don't down during each either few for from further had hadn't has hasn't
    have haven't having he he'd he'll he's her here hers herself him himself his i i'd i'll i'm
    i've if in into is isn't it it'd it'll it's its itself just let's may me might mightn't more
    most must mustn't my myself needn't neither no nor not of off on once only onto or other
    ought our ours ourselves out over own please per same shall shan't she she'd she'll she's
    should shouldn't so some such than that that's the their theirs them themselves then there
    there's these they they'd they'll they're they've this those through to too under until up
    upon very was wasn't we we'd we'll we're we've were weren't while will with within without
    won't would wouldn't you you'd you'll you're you've your yours yourself yourselves
";

static STOPPED: LazyLock<HashSet<&str>> = LazyLock::new(|| STOP_WORDS.split_whitespace().collect());

/// Byte ranges of the salient words and marks of a text, in order.
pub fn salient_spans(text: &str) -> Vec<Range<usize>> {
    let mut spans = Vec::new();
    let mut rest = text.char_indices().peekable();
    while let Some((start, c)) = rest.next() {
        if matches!(c, '?' | '!' | ':') {
            spans.push(start..start + c.len_utf8());
            continue;
        }
        if !c.is_alphanumeric() {
            continue;
        }
        let mut end = start + c.len_utf8();
        while let Some(&(at, next)) = rest.peek() {
            // An apostrophe belongs to the word if a letter follows it.
            let joins = matches!(next, '\'' | '’')
                && text[at + next.len_utf8()..].starts_with(char::is_alphanumeric);
            if !next.is_alphanumeric() && !joins {
                break;
            }
            end = at + next.len_utf8();
            rest.next();
        }
        let word = text[start..end].to_lowercase().replace('’', "'");
        if !STOPPED.contains(word.as_str()) {
            spans.push(start..end);
        }
    }
    spans
}

/// Which tokens are salient: those that touch a salient word or mark inside `question`, and the last one.
///
/// `offsets` are the tokens' byte ranges in `text`; `question` is the byte range of the user's words, so that
/// the roles a chat template writes (`USER:`) do not count. The result is as long as `offsets`.
pub fn salient_mask(text: &str, offsets: &[(usize, usize)], question: Range<usize>) -> Vec<bool> {
    let start = question.start;
    let spans: Vec<Range<usize>> = text
        .get(question)
        .map(salient_spans)
        .unwrap_or_default()
        .into_iter()
        .map(|span| span.start + start..span.end + start)
        .collect();
    let mut mask: Vec<bool> = offsets
        .iter()
        .map(|&(from, to)| spans.iter().any(|span| from < span.end && span.start < to))
        .collect();
    if let Some(last) = mask.last_mut() {
        *last = true;
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<&str> {
        salient_spans(text)
            .into_iter()
            .map(|span| &text[span])
            .collect()
    }

    #[test]
    fn content_words_question_words_and_marks_count() {
        assert_eq!(
            words("What is the man's hat made of? Answer: briefly!"),
            [
                "What", "man's", "hat", "made", "?", "Answer", ":", "briefly", "!"
            ]
        );
        assert_eq!(words("Isn’t it on the Straße?"), ["Straße", "?"]);
        assert_eq!(
            words("How many 'red' cars are there"),
            ["How", "many", "red", "cars"]
        );
        assert!(words("it is of the").is_empty());
        assert!(words("").is_empty());
    }

    #[test]
    fn tokens_count_when_they_touch_a_word_of_the_question() {
        let text = "USER: What is a zebra? ASSISTANT:";
        //          USER    :    " What"   " is"    " a"     " ze"     "bra"     "?"   " ASS"    …
        let offsets = [
            (0, 4),
            (4, 5),
            (5, 10),
            (10, 13),
            (13, 15),
            (15, 18),
            (18, 21),
            (21, 22),
            (22, 26),
        ];
        let offsets = [&[(0, 0)], &offsets[..], &[(26, 32), (32, 33)]].concat();
        let mask = salient_mask(text, &offsets, 6..22);
        let expected = [
            false, false, false, true, false, false, true, true, true, false, false, true,
        ];
        assert_eq!(mask, expected);
        assert_eq!(salient_mask(text, &[(0, 4)], 0..0), [true]);
        assert!(salient_mask(text, &[], 0..4).is_empty());
        // A range outside the text makes nothing salient but the last token.
        assert_eq!(salient_mask(text, &[(0, 4), (4, 5)], 90..99), [false, true]);
    }
}
