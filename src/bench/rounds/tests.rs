use std::cell::RefCell;
use std::rc::Rc;

use super::*;

type Log = Rc<RefCell<Vec<String>>>;

/// A model that notes what it is asked.
struct Fake {
    name: &'static str,
    log: Log,
    head: bool,
}

impl Performer for Fake {
    fn name(&self) -> &str {
        self.name
    }

    fn perform(&mut self, task: &Task) -> Result<Reply> {
        let (what, reply) = match task {
            Task::Turn => ("turn".to_owned(), Reply::Turn(Box::default())),
            Task::Length(n) => (format!("@{n}"), Reply::Length(LengthTime::default())),
            Task::Head(_) if !self.head => {
                ("no head".into(), Reply::Failed("it is headless".into()))
            }
            Task::Head(n) => (format!("head {n}"), Reply::Head(1.0)),
            Task::Memory => ("memory".into(), Reply::Memory(Ok(7))),
            // An answer to another question.
            Task::Profile(_) => ("profile".into(), Reply::Ready),
        };
        self.log.borrow_mut().push(format!("{} {what}", self.name));
        Ok(reply)
    }
}

fn run(head: bool, runs: usize) -> (Measured, Vec<String>) {
    let log = Log::default();
    let fake = |name| Fake {
        name,
        log: log.clone(),
        head,
    };
    let (mut a, mut b) = (fake("a"), fake("b"));
    let settings = Settings {
        warm_up: 2,
        runs: Some(runs),
    };
    let sweep = |turns: &[Turn]| {
        assert_eq!(turns.len(), 2);
        Ok((vec![10], vec![1]))
    };
    let measured = measure(&mut [&mut a, &mut b], settings, sweep, &mut |_| ()).unwrap();
    let log = log.borrow().clone();
    (measured, log)
}

#[test]
fn everything_is_measured_in_turns_and_each_round_starts_with_another() {
    let (measured, log) = run(true, 3);
    let warm = [
        "a turn", "a turn", "a memory", "b turn", "b turn", "b memory", "a head 1", "a @10",
    ];
    let rounds = [
        ["a turn", "b turn", "a @10", "a head 1"],
        ["b turn", "a @10", "a head 1", "a turn"],
        ["a @10", "a head 1", "a turn", "b turn"],
    ];
    assert_eq!(log, [&warm[..], &rounds.concat()].concat());
    assert_eq!(measured.rounds, 3);
    assert_eq!(
        measured.turns.iter().map(Vec::len).collect::<Vec<_>>(),
        [3, 3]
    );
    assert_eq!(measured.memory, [Ok(7), Ok(7)]);
    let points = (measured.lengths[0].1.len(), measured.heads[0].1.len());
    assert_eq!((points, measured.no_lengths), ((3, 3), None));
}

#[test]
fn a_base_whose_head_is_not_found_is_measured_without_ideals() {
    let (measured, log) = run(false, 1);
    assert_eq!(log[6..], ["a no head", "a turn", "b turn"]);
    assert_eq!(measured.no_lengths.as_deref(), Some("a: it is headless"));
    assert!(measured.lengths.is_empty() && measured.heads.is_empty());
}

#[test]
fn an_answer_to_another_question_is_an_error_that_names_the_model() {
    let log = Log::default();
    let mut fake = Fake {
        name: "a",
        log,
        head: true,
    };
    let error = profile(&mut fake, Path::new("nowhere"))
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("a: ") && error.contains("Ready"),
        "{error}"
    );
}

#[test]
fn as_many_rounds_as_fit() {
    let of = |ms| rounds_that_fit(Duration::from_millis(ms));
    assert_eq!(
        [of(1), of(3000), of(4500), of(60_000)],
        [MOST, 15, 10, LEAST]
    );
    assert_eq!(of(0), MOST);
}
