//! What people and programs read: the two streams, and everything that is printed on them.
//!
//! Colors are decided once, here: NO_COLOR, `--no-color`, and whether a stream is a terminal.

pub mod describe;
pub mod events;
pub mod inspect;
pub mod plan;
pub mod progress;
pub mod reload_plan;
pub mod table;
pub mod words;

use std::fmt;
use std::io::{self, IsTerminal, Write};

use anstream::{AutoStream, ColorChoice};
use owo_colors::{OwoColorize, Style};

/// Where output goes, and how it may look.
pub struct Terminal {
    out: Box<dyn Write>,
    err: Box<dyn Write>,
    look: Look,
}

/// What the streams can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Columns, where standard output is a terminal.
    pub width: Option<u16>,
    /// Colors on standard output.
    pub color_out: bool,
    /// Colors on standard error.
    pub color_err: bool,
    /// Lines may be redrawn: both streams are terminals.
    pub live: bool,
    /// Neither tables nor messages.
    pub silent: bool,
}

impl Look {
    /// A pipe.
    pub const PLAIN: Self =
        Self { width: None, color_out: false, color_err: false, live: false, silent: false };
}

impl fmt::Debug for Terminal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Terminal").field("look", &self.look).finish_non_exhaustive()
    }
}

impl Terminal {
    /// The process's own streams.
    #[must_use]
    pub fn of_process(no_color: bool, silent: bool) -> Self {
        let (out, err) = (io::stdout(), io::stderr());
        let colors = |choice: ColorChoice| !no_color && choice != ColorChoice::Never;
        let tty = out.is_terminal();
        let look = Look {
            // Asks the terminal itself; COLUMNS is a shell variable and seldom exported.
            width: if tty { comfy_table::Table::new().width() } else { None },
            color_out: colors(AutoStream::choice(&out)),
            color_err: colors(AutoStream::choice(&err)),
            live: tty && err.is_terminal(),
            silent,
        };
        Self { out: Box::new(out), err: Box::new(err), look }
    }

    /// Any two streams.
    #[must_use]
    pub fn of_streams(out: Box<dyn Write>, err: Box<dyn Write>, look: Look) -> Self {
        Self { out, err, look }
    }

    /// What the streams can show.
    #[must_use]
    pub const fn look(&self) -> Look {
        self.look
    }

    /// Prints a line for people; nothing with `--silent`.
    ///
    /// # Errors
    /// Standard output's.
    pub fn say(&mut self, line: &str) -> io::Result<()> {
        if self.look.silent { Ok(()) } else { writeln!(self.out, "{line}") }
    }

    /// Prints what a program asked for, `--silent` or not.
    ///
    /// # Errors
    /// Standard output's.
    pub fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    /// Prints what a program asked for, and a newline.
    ///
    /// # Errors
    /// Standard output's.
    pub fn data_line(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.out, "{line}")
    }

    /// Prints a line on standard error.
    ///
    /// # Errors
    /// Standard error's.
    pub fn complain(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.err, "{line}")
    }

    /// Prints `error: …` or `warning: …`, the first word in its color.
    ///
    /// # Errors
    /// Standard error's.
    pub fn error_line(&mut self, word: &str, text: &str) -> io::Result<()> {
        let style = if word == "error:" { Style::new().red().bold() } else { Style::new().yellow().bold() };
        let word = self.on_err(word, style);
        self.complain(&format!("{word} {text}"))
    }

    /// Prints `hint: …`.
    ///
    /// # Errors
    /// Standard error's.
    pub fn hint_line(&mut self, text: &str) -> io::Result<()> {
        let word = self.on_err("hint:", Style::new().cyan().bold());
        self.complain(&format!("{word} {text}"))
    }

    /// Text in a style, where standard output shows styles.
    #[must_use]
    pub fn on_out(&self, text: &str, style: Style) -> String {
        if self.look.color_out { text.style(style).to_string() } else { text.to_owned() }
    }

    /// Hands everything to the kernel.
    ///
    /// # Errors
    /// Standard output's.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()?;
        self.err.flush()
    }

    fn on_err(&self, text: &str, style: Style) -> String {
        if self.look.color_err { text.style(style).to_string() } else { text.to_owned() }
    }
}
