//! Policies: which changes a pipeline lets through.
//!
//! ```yaml
//! version: 1
//! rtol: 1.0e-5              # weights: |b − a| ≤ atol + rtol·|a| is no change
//! atol: 1.0e-8
//! rewrites:                 # exactly these, at exactly so many places
//!   visual_prune/drop*: 2   # what else the pass inserts goes along
//! rules:                    # the first that fits a place decides about it
//!   - allow: [metadata, shapes]
//!   - allow: weights
//!     scope: "*layernorm*"  # names of nodes or values
//!     max_relative: 1.0e-4  # ‖b − a‖ / ‖a‖
//!   - deny: attribute
//!     file: "onnx/vision*"
//! default: deny             # what no rule decides about: deny (if left out) or allow
//! ```
//!
//! A rule is about *places*: a change that is repeated in 28 layers can be
//! allowed in some and denied in others, and is then told as two changes. What
//! is allowed is marked as not counted, with the rule as the reason.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_yaml::Value;

use super::DiffError;
use super::change::worst;
use super::files::regular;
use super::report::{Change, Class, Kind, Place, Report, Spot, WeightChange};
use crate::suggest::unknown;

const KEYS: &[&str] = &["version", "rtol", "atol", "rewrites", "rules", "default"];
const RULE_KEYS: &[&str] = &[
    "allow",
    "deny",
    "file",
    "scope",
    "subject",
    "pass",
    "max_abs",
    "max_relative",
    "max_share",
    "times",
];

/// Larger files are no policies.
const MAX_SIZE: u64 = 1 << 20;

/// Which changes are let through.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Where it was read from, for messages and reports.
    pub path: String,
    /// Relative tolerance for weights, if it states one.
    pub rtol: Option<f64>,
    /// Absolute tolerance for weights, if it states one.
    pub atol: Option<f64>,
    rules: Vec<Rule>,
    /// Whether changes that no rule fits are allowed.
    allow_rest: bool,
}

/// What a policy came to, for each of its rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyResult {
    /// The policy's file.
    pub path: String,
    /// Its rules in order; `rewrites` are rules in front, `default` is the last.
    pub rules: Vec<RuleResult>,
}

impl PolicyResult {
    /// Whether every rule is kept.
    pub fn passed(&self) -> bool {
        self.rules.iter().all(|r| r.violation.is_none())
    }
}

/// What one rule came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleResult {
    /// The rule on one line: `allow weights, scope *norm*`.
    pub rule: String,
    /// Number of places that it decided about.
    pub places: usize,
    /// How the models break it, if they do.
    pub violation: Option<String>,
}

/// Classes or kinds of changes, by the words that reports use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    all: bool,
    classes: Vec<Class>,
    kinds: Vec<Kind>,
}

impl Selection {
    /// Reads words like `weights` (a class), `doc-string` (a kind) or `all`.
    ///
    /// # Errors
    /// A word that is neither, with the nearest known one.
    pub fn parse<'w>(
        words: impl IntoIterator<Item = &'w str>,
        place: &str,
    ) -> Result<Self, DiffError> {
        let mut found = Self::default();
        for word in words {
            let class = Class::ALL.into_iter().find(|c| c.word() == word);
            let kind = Kind::ALL.into_iter().find(|k| k.word() == word);
            match (class, kind) {
                _ if word == "all" => found.all = true,
                // One word is both: the class holds the kind.
                (Some(class), _) => found.classes.push(class),
                (None, Some(kind)) => found.kinds.push(kind),
                (None, None) => {
                    let kinds: Vec<String> = Kind::ALL.into_iter().map(Kind::word).collect();
                    let mut known: Vec<&str> = Class::ALL.into_iter().map(Class::word).collect();
                    known.push("all");
                    known.extend(kinds.iter().map(String::as_str));
                    return Err(DiffError::Policy(unknown("class", word, &known, place)));
                }
            }
        }
        Ok(found)
    }

    /// Whether it holds a change.
    pub fn holds(&self, change: &Change) -> bool {
        self.all || self.classes.contains(&change.class) || self.kinds.contains(&change.kind)
    }
}

/// Marks the selected changes as not counted.
pub fn ignore(report: &mut Report, selection: &Selection) {
    for change in report.files.iter_mut().flat_map(|f| &mut f.changes) {
        if change.ignored.is_none() && selection.holds(change) {
            change.ignored = Some(format!("--ignore {}", change.class.word()));
        }
    }
    report.settle();
}

#[derive(Clone, Debug, PartialEq)]
struct Rule {
    allow: bool,
    /// As it is told.
    text: String,
    what: Selection,
    file: Option<String>,
    scope: Option<String>,
    subject: Option<String>,
    pass: Option<String>,
    max_abs: Option<f64>,
    max_relative: Option<f64>,
    max_share: Option<f64>,
    times: Option<usize>,
}

#[derive(Deserialize)]
struct Raw {
    version: u32,
    rtol: Option<f64>,
    atol: Option<f64>,
    rewrites: Option<BTreeMap<String, usize>>,
    #[serde(default)]
    rules: Vec<Value>,
    default: Option<String>,
}

#[derive(Deserialize)]
struct RawRule {
    allow: Option<Words>,
    deny: Option<Words>,
    file: Option<String>,
    scope: Option<String>,
    subject: Option<String>,
    pass: Option<String>,
    max_abs: Option<f64>,
    max_relative: Option<f64>,
    max_share: Option<f64>,
    times: Option<usize>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    One(String),
    Many(Vec<String>),
}

impl Words {
    fn list(&self) -> Vec<&str> {
        match self {
            Self::One(word) => vec![word],
            Self::Many(list) => list.iter().map(String::as_str).collect(),
        }
    }
}

fn bad(message: impl Into<String>) -> DiffError {
    DiffError::Policy(message.into())
}

impl Policy {
    /// Reads a policy file.
    ///
    /// # Errors
    /// A file that cannot be read or is no policy; unknown keys and words name
    /// the nearest known one.
    pub fn read(path: &Path) -> Result<Self, DiffError> {
        let at = |message: String| bad(format!("{}: {message}", path.display()));
        regular(path)?;
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(DiffError::io(path))?;
        // What the file system says of the size need not be how much there is.
        let size = file.take(MAX_SIZE + 1).read_to_string(&mut text);
        let size = size.map_err(DiffError::io(path))? as u64;
        if size > MAX_SIZE {
            return Err(at(format!("more than {MAX_SIZE} bytes are no policy")));
        }
        let mut policy = Self::parse(&text).map_err(|e| at(e.to_string()))?;
        policy.path = path.display().to_string();
        Ok(policy)
    }

    /// Reads a policy's text.
    ///
    /// # Errors
    /// As [`Policy::read`].
    pub fn parse(text: &str) -> Result<Self, DiffError> {
        let value: Value = serde_yaml::from_str(text).map_err(|e| bad(e.to_string()))?;
        check_keys(&value, KEYS, "the policy")?;
        let raw: Raw = serde_yaml::from_value(value).map_err(|e| bad(e.to_string()))?;
        if raw.version != 1 {
            let version = raw.version;
            return Err(bad(format!("version {version} is not known; expected 1")));
        }
        for (name, value) in [("rtol", raw.rtol), ("atol", raw.atol)] {
            limit(name, value)?;
        }
        let allow_rest = match raw.default.as_deref() {
            None | Some("deny") => false,
            Some("allow") => true,
            Some(other) => {
                return Err(bad(format!(
                    "default: expected 'allow' or 'deny', found '{other}'"
                )));
            }
        };
        let mut rules = Vec::new();
        if let Some(rewrites) = raw.rewrites {
            rules.extend(expected(&rewrites)?);
        }
        for (i, value) in raw.rules.into_iter().enumerate() {
            rules.push(rule(value, i + 1)?);
        }
        Ok(Self {
            path: "policy".into(),
            rtol: raw.rtol,
            atol: raw.atol,
            rules,
            allow_rest,
        })
    }

    /// Applies the rules to a report: marks what is allowed as not counted, and
    /// says for each rule what it came to.
    pub fn apply(&self, report: &mut Report) {
        let mut places = vec![0_usize; self.rules.len()];
        let (mut rest, mut uncounted) = (0_usize, 0_usize);
        for file in &mut report.files {
            let (path, path_b) = (file.path.clone(), file.path_b.clone());
            let mut out = Vec::new();
            for change in file.changes.drain(..) {
                if change.ignored.is_some() {
                    out.push(change);
                    continue;
                }
                // Places by the rule that decides, the change's first one first.
                let mut parts: Vec<(Option<usize>, Vec<Place>)> = Vec::new();
                for place in change.places.iter().cloned() {
                    let of = self.rules.iter().position(|rule| {
                        rule.names(&path, path_b.as_deref()) && rule.fits(&change, &place)
                    });
                    match parts.iter_mut().find(|(rule, _)| *rule == of) {
                        Some((_, list)) => list.push(place),
                        None => parts.push((of, vec![place])),
                    }
                }
                let whole = parts.len() == 1;
                for (of, list) in parts {
                    let count = list.len();
                    let mut part = change.clone();
                    if !whole {
                        let all = list.iter().filter_map(|p| p.weights.clone());
                        part.weights = all.reduce(worst);
                        part.places = list;
                    }
                    match of {
                        Some(i) => {
                            places[i] += count;
                            if self.rules[i].allow {
                                part.ignored = Some(self.rules[i].text.clone());
                            }
                        }
                        None if self.allow_rest => {
                            rest += count;
                            part.ignored = Some("allowed by default".into());
                        }
                        None if part.class.counts() => rest += count,
                        None => uncounted += count,
                    }
                    out.push(part);
                }
            }
            file.changes = out;
        }
        let mut rules: Vec<RuleResult> = self
            .rules
            .iter()
            .zip(places)
            .map(|(rule, places)| RuleResult {
                rule: rule.text.clone(),
                places,
                violation: rule.violation(places),
            })
            .collect();
        rules.push(RuleResult {
            rule: format!("{} everything else", word(self.allow_rest)),
            places: rest + uncounted,
            violation: (rest > 0 && !self.allow_rest)
                .then(|| format!("{} allowed by no rule", at_places(rest))),
        });
        report.policy = Some(PolicyResult {
            path: self.path.clone(),
            rules,
        });
        report.settle();
    }
}

fn word(allow: bool) -> &'static str {
    if allow { "allow" } else { "deny" }
}

fn times_text(n: usize) -> String {
    match n {
        1 => "exactly once".into(),
        n => format!("exactly {n} times"),
    }
}

fn at_places(n: usize) -> String {
    match n {
        1 => "a change at 1 place".into(),
        n => format!("changes at {n} places"),
    }
}

/// Refuses keys that are not known, naming the nearest that is.
fn check_keys(value: &Value, known: &[&str], place: &str) -> Result<(), DiffError> {
    let Value::Mapping(map) = value else {
        return Err(bad(format!(
            "expected {place} to be a mapping with keys like '{}'",
            known[0]
        )));
    };
    for key in map.keys() {
        let shown = key
            .as_str()
            .map_or_else(|| format!("{key:?}"), str::to_owned);
        if !known.contains(&shown.as_str()) {
            return Err(bad(unknown("key", &shown, known, place)));
        }
    }
    Ok(())
}

/// A limit is a finite number that is not negative.
fn limit(name: &str, value: Option<f64>) -> Result<Option<f64>, DiffError> {
    match value {
        Some(x) if !x.is_finite() || x < 0.0 => Err(bad(format!(
            "{name}: {x} is no limit; expected a number of 0 or more"
        ))),
        other => Ok(other),
    }
}

fn rule(value: Value, number: usize) -> Result<Rule, DiffError> {
    let place = format!("rule {number}");
    check_keys(&value, RULE_KEYS, &place)?;
    let raw: RawRule = serde_yaml::from_value(value).map_err(|e| bad(format!("{place}: {e}")))?;
    let (allow, words) = match (&raw.allow, &raw.deny) {
        (Some(words), None) => (true, words.list()),
        (None, Some(words)) => (false, words.list()),
        _ => {
            return Err(bad(format!(
                "{place}: expected either 'allow' or 'deny', with classes or kinds of changes"
            )));
        }
    };
    if words.is_empty() {
        return Err(bad(format!("{place}: {} names nothing", word(allow))));
    }
    let what = Selection::parse(words.iter().copied(), &place)?;
    let limits = [
        ("max_abs", raw.max_abs),
        ("max_relative", raw.max_relative),
        ("max_share", raw.max_share),
    ];
    for (name, value) in limits {
        if limit(&format!("{place}: {name}"), value)?.is_some() && !allow {
            return Err(bad(format!(
                "{place}: {name} says how much is allowed; use it with 'allow', and deny the rest \
                 with a rule behind it"
            )));
        }
    }
    if raw.times.is_some() && !allow {
        return Err(bad(format!(
            "{place}: times says how often something is expected; use it with 'allow'"
        )));
    }
    let mut text = format!("{} {}", word(allow), words.join(", "));
    let conditions = [
        ("file", &raw.file),
        ("scope", &raw.scope),
        ("subject", &raw.subject),
        ("pass", &raw.pass),
    ];
    for (name, value) in conditions {
        if let Some(value) = value {
            text.push_str(&format!(", {name} {value}"));
        }
    }
    for (name, value) in limits {
        if let Some(value) = value {
            text.push_str(&format!(", {name} {value:?}"));
        }
    }
    if let Some(times) = raw.times {
        text.push_str(&format!(", {}", times_text(times)));
    }
    Ok(Rule {
        text,
        file: raw.file,
        scope: raw.scope,
        subject: raw.subject,
        pass: raw.pass,
        max_abs: raw.max_abs,
        max_relative: raw.max_relative,
        max_share: raw.max_share,
        times: raw.times,
        ..Rule::of(allow, what)
    })
}

/// Rules for exactly these rewrites: each named one so many times, the other parts
/// of the same passes, nothing else.
fn expected(rewrites: &BTreeMap<String, usize>) -> Result<Vec<Rule>, DiffError> {
    let what = Selection::parse(["rewrite"], "rewrites")?;
    let mut rules = Vec::new();
    let mut passes = std::collections::BTreeSet::new();
    // A part is asked for before the whole pass takes everything.
    let (parts, whole): (Vec<_>, Vec<_>) = rewrites.iter().partition(|(k, _)| k.contains('/'));
    for (key, times) in parts.into_iter().chain(whole) {
        let (pass, part) = match key.split_once('/') {
            Some((pass, part)) => (pass, Some(part.to_owned())),
            None => (key.as_str(), None),
        };
        passes.insert(pass);
        rules.push(Rule {
            text: format!("rewrite {key}, {}", times_text(*times)),
            pass: Some(pass.to_owned()),
            subject: part,
            times: Some(*times),
            ..Rule::of(true, what.clone())
        });
    }
    for pass in passes {
        if !rewrites.contains_key(pass) {
            rules.push(Rule {
                text: format!("rewrite {pass}, what else belongs to it"),
                pass: Some(pass.to_owned()),
                ..Rule::of(true, what.clone())
            });
        }
    }
    rules.push(Rule {
        text: "no other rewrites".into(),
        ..Rule::of(false, what)
    });
    Ok(rules)
}

impl Rule {
    /// A rule without conditions.
    fn of(allow: bool, what: Selection) -> Self {
        Self {
            allow,
            text: String::new(),
            what,
            file: None,
            scope: None,
            subject: None,
            pass: None,
            max_abs: None,
            max_relative: None,
            max_share: None,
            times: None,
        }
    }

    /// Whether it is about a file of these names.
    fn names(&self, path: &str, path_b: Option<&str>) -> bool {
        let pattern = self.file.as_deref();
        pattern.is_none_or(|p| glob(p, path) || path_b.is_some_and(|b| glob(p, b)))
    }

    /// Whether it is about this place of a change.
    fn fits(&self, change: &Change, place: &Place) -> bool {
        let is = |pattern: &Option<String>, name: &Option<String>| match (pattern, name) {
            (None, _) => true,
            (Some(pattern), Some(name)) => glob(pattern, name),
            (Some(_), None) => false,
        };
        self.what.holds(change)
            && self.is_about(change, place)
            && is(&self.pass, &change.pass)
            && self.scope.as_deref().is_none_or(|s| self.covers(s, place))
            && self.within(change, place)
    }

    /// Whether the part that changed fits. Many entries of one config are one
    /// change, whose subject is no key of any of them; each place has its own.
    fn is_about(&self, change: &Change, place: &Place) -> bool {
        let Some(pattern) = &self.subject else {
            return true;
        };
        let files = matches!(
            change.kind,
            Kind::ModelAdded | Kind::ModelRemoved | Kind::ModelRenamed
        );
        let spots = [&place.a, &place.b].into_iter().flatten();
        let mut names = spots
            .filter(|_| files || change.class == Class::Config)
            .filter_map(|spot| spot.value.as_deref())
            .peekable();
        match (names.peek(), &change.subject) {
            (Some(_), _) => names.any(|name| glob(pattern, name)),
            (None, Some(subject)) => glob(pattern, subject),
            (None, None) => false,
        }
    }

    /// Whether a place lies in a scope: for an allowance all that changed there,
    /// for a denial any of it.
    fn covers(&self, scope: &str, place: &Place) -> bool {
        let name = |spot: &Spot| {
            let node = spot.node.clone().filter(|n| !n.is_empty());
            node.or_else(|| spot.value.clone())
        };
        let inside = |spot: &Spot| name(spot).is_some_and(|n| glob(scope, &n));
        let mut nodes = place.removed.iter().chain(&place.added).peekable();
        if nodes.peek().is_some() {
            return if self.allow {
                nodes.all(inside)
            } else {
                nodes.any(inside)
            };
        }
        // One thing that may have two names.
        [&place.a, &place.b].into_iter().flatten().any(inside)
    }

    /// Whether a change of weights stays within the limits. Only elements that
    /// can be compared can.
    fn within(&self, change: &Change, place: &Place) -> bool {
        if self.max_abs.is_none() && self.max_relative.is_none() && self.max_share.is_none() {
            return true;
        }
        let Some(w) = place.weights.as_ref().or(change.weights.as_ref()) else {
            return false;
        };
        let below = |limit: Option<f64>, value: Option<f64>| match (limit, value) {
            (None, _) => true,
            (Some(limit), Some(value)) => value <= limit,
            (Some(_), None) => false,
        };
        w.changed > 0
            && w.non_finite == 0
            && below(self.max_abs, w.max_abs)
            && below(self.max_relative, relative(w))
            && below(
                self.max_share,
                Some(w.changed as f64 / w.elements.max(1) as f64),
            )
    }

    fn violation(&self, places: usize) -> Option<String> {
        match self.times {
            Some(times) if times != places => {
                let found = match places {
                    0 => "it is not there".into(),
                    n => format!(
                        "found at {}",
                        if n == 1 {
                            "1 place".into()
                        } else {
                            format!("{n} places")
                        }
                    ),
                };
                Some(format!("expected {}, {found}", times_text(times)))
            }
            _ if !self.allow && places > 0 => Some(at_places(places)),
            _ => None,
        }
    }
}

/// ‖b − a‖ / ‖a‖; of zeros that changed nothing can be said.
fn relative(w: &WeightChange) -> Option<f64> {
    let (a, d) = (w.norm_a?, w.norm_diff?);
    if d == 0.0 {
        return Some(0.0);
    }
    (a > 0.0).then_some(d / a)
}

/// Whether a name fits a pattern with `*` (anything, `/` too) and `?` (one
/// character). Linear in practice, at worst the product of both lengths.
fn glob(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where to go on after the last star if what follows it does not fit here.
    let mut back: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                back = Some((p + 1, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match back {
                Some((star, from)) => {
                    back = Some((star, from + 1));
                    p = star;
                    n = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}
