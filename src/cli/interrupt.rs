//! Ends that come from outside: Ctrl-C, being asked to end, output that nobody takes. Nothing half-written is left
//! behind.

use crate::onnx::unfinished::discard;

/// Removes what is unfinished when the program is interrupted, and then ends it as the signal would have.
#[cfg(unix)]
pub(super) fn watch() {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use signal_hook::iterator::Signals;
    use signal_hook::low_level::emulate_default_handler;

    let ignored = ignored();
    let heard = [SIGINT, SIGTERM, SIGHUP];
    let heard = heard.into_iter().filter(|s| ignored & (1 << (s - 1)) == 0);
    // Without it, all works but the tidying up.
    let Ok(mut signals) = Signals::new(heard) else {
        return;
    };
    std::thread::spawn(move || {
        for signal in signals.forever() {
            let _held = discard();
            let _ = emulate_default_handler(signal);
        }
    });
}

/// Nothing is heard here.
#[cfg(not(unix))]
pub(super) fn watch() {}

/// Signals that whoever started the program wants ignored (`nohup`, jobs in the background of a script), as a mask.
#[cfg(unix)]
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    line.map_or(0, |mask| u64::from_str_radix(mask.trim(), 16).unwrap_or(0))
}

/// Makes output that cannot be printed, as on a full disk, an error like others, where the macros that print panic. A
/// reader that has gone (`| head`) they pass over.
pub(super) fn watch_output() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload_as_str().unwrap_or_default();
        let Some(what) = said.strip_prefix("failed printing to ") else {
            return usual(panic);
        };
        let _held = discard();
        // It may be this that cannot be printed to.
        let _ = std::io::Write::write_fmt(
            &mut std::io::stderr(),
            format_args!("error: writing to {what}\n"),
        );
        std::process::exit(2);
    }));
}
