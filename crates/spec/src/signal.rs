//! Signal names.

use stave_cri_proto::v1::Signal;

use crate::SpecError;

/// The first and the last real-time signal that programs may use (glibc keeps 32 and 33 to itself).
const RT_MIN: i32 = 34;
const RT_MAX: i32 = 64;

/// Names without SIG, the usual name of a number first.
const NAMES: &[(&str, i32, Signal)] = &[
    ("HUP", libc::SIGHUP, Signal::Sighup),
    ("INT", libc::SIGINT, Signal::Sigint),
    ("QUIT", libc::SIGQUIT, Signal::Sigquit),
    ("ILL", libc::SIGILL, Signal::Sigill),
    ("TRAP", libc::SIGTRAP, Signal::Sigtrap),
    ("ABRT", libc::SIGABRT, Signal::Sigabrt),
    ("IOT", libc::SIGABRT, Signal::Sigiot),
    ("BUS", libc::SIGBUS, Signal::Sigbus),
    ("FPE", libc::SIGFPE, Signal::Sigfpe),
    ("KILL", libc::SIGKILL, Signal::Sigkill),
    ("USR1", libc::SIGUSR1, Signal::Sigusr1),
    ("SEGV", libc::SIGSEGV, Signal::Sigsegv),
    ("USR2", libc::SIGUSR2, Signal::Sigusr2),
    ("PIPE", libc::SIGPIPE, Signal::Sigpipe),
    ("ALRM", libc::SIGALRM, Signal::Sigalrm),
    ("TERM", libc::SIGTERM, Signal::Sigterm),
    ("STKFLT", libc::SIGSTKFLT, Signal::Sigstkflt),
    ("CHLD", libc::SIGCHLD, Signal::Sigchld),
    ("CLD", libc::SIGCHLD, Signal::Sigcld),
    ("CONT", libc::SIGCONT, Signal::Sigcont),
    ("STOP", libc::SIGSTOP, Signal::Sigstop),
    ("TSTP", libc::SIGTSTP, Signal::Sigtstp),
    ("TTIN", libc::SIGTTIN, Signal::Sigttin),
    ("TTOU", libc::SIGTTOU, Signal::Sigttou),
    ("URG", libc::SIGURG, Signal::Sigurg),
    ("XCPU", libc::SIGXCPU, Signal::Sigxcpu),
    ("XFSZ", libc::SIGXFSZ, Signal::Sigxfsz),
    ("VTALRM", libc::SIGVTALRM, Signal::Sigvtalrm),
    ("PROF", libc::SIGPROF, Signal::Sigprof),
    ("WINCH", libc::SIGWINCH, Signal::Sigwinch),
    ("IO", libc::SIGIO, Signal::Sigio),
    ("POLL", libc::SIGPOLL, Signal::Sigpoll),
    ("PWR", libc::SIGPWR, Signal::Sigpwr),
    ("SYS", libc::SIGSYS, Signal::Sigsys),
];

/// The number of a signal: "SIGTERM", "TERM", "15", "SIGRTMIN+3". `None`: no such signal.
pub fn signal(name: &str) -> Option<i32> {
    if !name.is_empty() && name.bytes().all(|b| b.is_ascii_digit()) {
        return name.parse().ok().filter(|n| (1..=RT_MAX).contains(n));
    }
    let upper = name.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return offset(rest, '+').map(|n| RT_MIN + n);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return offset(rest, '-').map(|n| RT_MAX - n);
    }
    NAMES.iter().find(|(n, ..)| *n == name).map(|(_, number, _)| *number)
}

/// "" or `sign` and a number that stays within the real-time signals.
fn offset(text: &str, sign: char) -> Option<i32> {
    if text.is_empty() {
        return Some(0);
    }
    let digits = text.strip_prefix(sign)?;
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().filter(|n| (0..=RT_MAX - RT_MIN).contains(n))
}

/// The CRI's name of a signal number; `RUNTIME_DEFAULT` where it has none.
pub fn cri_signal(number: i32) -> Signal {
    if let Some((.., signal)) = NAMES.iter().find(|(_, n, _)| *n == number) {
        return *signal;
    }
    // The CRI numbers them in a row, from SIGRTMIN to SIGRTMAX.
    if (RT_MIN..=RT_MAX).contains(&number) {
        return Signal::try_from(Signal::Sigrtmin as i32 + number - RT_MIN).unwrap_or(Signal::RuntimeDefault);
    }
    Signal::RuntimeDefault
}

/// The number of a CRI signal; `None` for `RUNTIME_DEFAULT`.
fn number(signal: Signal) -> Option<i32> {
    if let Some((_, n, _)) = NAMES.iter().find(|(.., s)| *s == signal) {
        return Some(*n);
    }
    let rt = signal as i32 - Signal::Sigrtmin as i32;
    (0..=RT_MAX - RT_MIN).contains(&rt).then_some(RT_MIN + rt)
}

/// The signal that stops a container: the request's, else the image's, else SIGTERM.
pub(crate) fn stop_signal(request: i32, image: &str) -> Result<(i32, Signal), SpecError> {
    let wanted = Signal::try_from(request)
        .map_err(|_| SpecError::invalid("config.stop_signal", request, "is not a signal of the CRI"))?;
    if let Some(n) = number(wanted) {
        return Ok((n, wanted));
    }
    if image.is_empty() {
        return Ok((libc::SIGTERM, Signal::Sigterm));
    }
    let n = signal(image).ok_or_else(|| SpecError::invalid("image.stop_signal", image, "is not a signal"))?;
    Ok((n, cri_signal(n)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_names_and_numbers() {
        for (name, want) in [
            ("SIGTERM", Some(15)),
            ("TERM", Some(15)),
            ("sigterm", Some(15)),
            ("15", Some(15)),
            ("SIGCLD", Some(17)),
            ("SIGIOT", Some(6)),
            ("SIGPOLL", Some(29)),
            ("RTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGRTMIN+30", Some(64)),
            ("SIGRTMAX-1", Some(63)),
            ("SIGRTMIN+31", None),
            ("SIGRTMIN-1", None),
            ("SIGRTMIN+", None),
            ("SIGRTMIN++1", None),
            ("", None),
            ("0", None),
            ("65", None),
            ("-9", None),
            ("+9", None),
            ("99999999999", None),
            ("SIGNOPE", None),
            ("SIGSIGTERM", None),
        ] {
            assert_eq!(signal(name), want, "{name}");
        }
    }

    #[test]
    fn every_cri_signal_has_its_number_and_back() {
        for i in 1..=65 {
            let wanted = Signal::try_from(i).unwrap();
            let n = number(wanted).unwrap_or_else(|| panic!("{wanted:?}"));
            // Aliases come back under their usual name.
            assert_eq!(number(cri_signal(n)), Some(n), "{wanted:?}");
            let name = wanted.as_str_name().replace("PLUS", "+").replace("MINUS", "-");
            assert_eq!(signal(&name), Some(n), "{name}");
        }
        assert_eq!(number(Signal::RuntimeDefault), None);
        assert_eq!(cri_signal(32), Signal::RuntimeDefault);
        assert_eq!(cri_signal(37), Signal::Sigrtminplus3);
        assert_eq!(cri_signal(0), Signal::RuntimeDefault);
    }

    #[test]
    fn request_wins_over_image() {
        let int = Signal::Sigint as i32;
        assert_eq!(stop_signal(int, "SIGQUIT").unwrap(), (2, Signal::Sigint));
        assert_eq!(stop_signal(int, "nonsense").unwrap(), (2, Signal::Sigint));
        assert_eq!(stop_signal(Signal::Sigpoll as i32, "").unwrap(), (29, Signal::Sigpoll));
        assert_eq!(stop_signal(0, "SIGQUIT").unwrap(), (3, Signal::Sigquit));
        assert_eq!(stop_signal(0, "").unwrap(), (15, Signal::Sigterm));
        assert_eq!(stop_signal(0, "nonsense").unwrap_err().field, "image.stop_signal");
        assert_eq!(stop_signal(66, "").unwrap_err().field, "config.stop_signal");
    }
}
