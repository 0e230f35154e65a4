//! A search by successive halving: all candidates answer a few questions, the better third more of them, and so on.
//!
//! Candidates of a round are compared on the same questions. The first candidate, what would be taken without a search,
//! is never dropped, so the winner is no worse than it on the questions of the search. With many candidates some look
//! better than they are by chance; the last round is therefore over all questions that there are.

/// What a candidate reached on the questions so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reached {
    /// Mean worth of its answers.
    pub accuracy: f64,
    /// Share of answers that are the unreduced model's: decides between equal accuracies.
    pub agreement: f64,
}

/// One round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Candidates in it.
    pub candidates: usize,
    /// Clusters of questions that all of them answer, those of earlier rounds counted.
    pub clusters: usize,
}

/// Candidates in a round for each that goes on.
const RATE: usize = 3;
/// At least so many go to the last round.
const LAST: usize = 3;

/// The rounds for a number of candidates and of clusters: the last is over all clusters, each one before over a third
/// of the next, but not over fewer than `least`.
pub fn rounds(candidates: usize, clusters: usize, least: usize) -> Vec<Round> {
    let mut sizes = vec![candidates];
    while let Some(&last) = sizes.last()
        && last > LAST
    {
        sizes.push(last.div_ceil(RATE).max(LAST));
    }
    let mut wanted = clusters;
    let mut rounds: Vec<Round> = Vec::new();
    for &candidates in sizes.iter().rev() {
        rounds.push(Round {
            candidates,
            clusters: wanted,
        });
        wanted = wanted.div_ceil(RATE).max(least).min(wanted);
    }
    rounds.reverse();
    // Rounds over the same questions are one.
    rounds.dedup_by(|later, earlier| later.clusters == earlier.clusters);
    rounds
}

/// A candidate with the round it came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Standing {
    /// Its index.
    pub candidate: usize,
    /// Clusters that it answered.
    pub clusters: usize,
    /// What it reached on them.
    pub reached: Reached,
}

/// Runs the rounds. `ask(candidate, clusters)` answers the first so many clusters and says what was reached on them.
/// The result is ordered: the winner first, then by rounds and by what was reached.
///
/// # Errors
/// What `ask` gives.
pub fn search<E>(
    candidates: usize,
    rounds: &[Round],
    ask: &mut dyn FnMut(usize, usize) -> Result<Reached, E>,
) -> Result<Vec<Standing>, E> {
    let mut order: Vec<usize> = (0..candidates).collect();
    let mut standings: Vec<Option<Standing>> = vec![None; candidates];
    for round in rounds {
        order.truncate(round.candidates.max(1));
        if !order.contains(&0) && candidates > 0 {
            order.pop();
            order.push(0);
        }
        for &candidate in &order {
            let reached = ask(candidate, round.clusters)?;
            standings[candidate] = Some(Standing {
                candidate,
                clusters: round.clusters,
                reached,
            });
        }
        order.sort_by(|a, b| better(&standings[*a], &standings[*b]).then(a.cmp(b)));
    }
    let mut all: Vec<Standing> = standings.into_iter().flatten().collect();
    all.sort_by(|a, b| {
        let rounds = b.clusters.cmp(&a.clusters);
        let reached = better(&Some(*a), &Some(*b));
        rounds.then(reached).then(a.candidate.cmp(&b.candidate))
    });
    Ok(all)
}

fn better(a: &Option<Standing>, b: &Option<Standing>) -> std::cmp::Ordering {
    let key = |s: &Option<Standing>| {
        s.map_or((f64::MIN, f64::MIN), |s| {
            (s.reached.accuracy, s.reached.agreement)
        })
    };
    let (a, b) = (key(a), key(b));
    b.0.total_cmp(&a.0).then(b.1.total_cmp(&a.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_end_with_all_questions() {
        let of = |candidates, clusters| -> Vec<(usize, usize)> {
            let found = rounds(candidates, clusters, 16);
            found.iter().map(|r| (r.candidates, r.clusters)).collect()
        };
        assert_eq!(of(48, 400), [(48, 16), (16, 45), (6, 134), (3, 400)]);
        assert_eq!(of(3, 400), [(3, 400)]);
        assert_eq!(of(1, 5), [(1, 5)]);
        // Too few questions for rounds: all answer all.
        assert_eq!(of(48, 10), [(48, 10)]);
        assert_eq!(of(10, 30), [(10, 16), (3, 30)]);
    }

    /// Candidate 7 is the best by far, and seen to be on few questions; 0 stays to the end.
    #[test]
    fn the_best_wins_and_the_first_stays() {
        let mut asked = Vec::new();
        let mut ask = |candidate: usize, clusters: usize| -> Result<Reached, ()> {
            asked.push((candidate, clusters));
            let accuracy = if candidate == 7 {
                0.9
            } else {
                0.5 - 0.01 * (20.0 - candidate as f64)
            };
            Ok(Reached {
                accuracy,
                agreement: 0.5,
            })
        };
        let rounds = rounds(20, 300, 16);
        let found = search(20, &rounds, &mut ask).unwrap();
        assert_eq!(found.len(), 20);
        assert_eq!((found[0].candidate, found[0].clusters), (7, 300));
        let last: Vec<usize> = found
            .iter()
            .filter(|s| s.clusters == 300)
            .map(|s| s.candidate)
            .collect();
        assert_eq!(last, [7, 19, 0]);
        assert!(asked.len() < 20 + 7 + 3 + 1, "{asked:?}");
    }

    #[test]
    fn agreement_decides_between_equals_and_then_the_order() {
        let of = |agreements: [f64; 3]| {
            let mut ask = |candidate: usize, _| -> Result<Reached, ()> {
                Ok(Reached {
                    accuracy: 0.5,
                    agreement: agreements[candidate],
                })
            };
            let found = search(3, &rounds(3, 9, 1), &mut ask).unwrap();
            found.iter().map(|s| s.candidate).collect::<Vec<_>>()
        };
        assert_eq!(of([0.1, 0.3, 0.2]), [1, 2, 0]);
        assert_eq!(of([0.2, 0.2, 0.2]), [0, 1, 2]);
    }

    #[test]
    fn a_model_that_fails_ends_the_search() {
        let mut ask = |_: usize, _: usize| Err("broken");
        assert_eq!(search(2, &rounds(2, 9, 1), &mut ask), Err("broken"));
    }
}
