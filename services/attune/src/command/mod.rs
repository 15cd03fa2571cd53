//! The commands, one file for each noun.

mod answers;
mod artifacts;
mod attempt;
mod audit;
mod classify;
mod completions;
mod convert;
mod data;
mod demo;
mod doctor;
mod drift;
mod embed;
mod experiment;
mod fairness;
mod generate;
mod jobs;
mod looks;
mod made;
mod merge;
mod methods;
mod projects;
mod submit;
mod tokens;
mod up;
mod validate;
mod workers;

use clap::{Parser, Subcommand};

use crate::print::{Failure, Out};

/// Tunes language models with many methods, on one machine or a fleet of workers.
#[derive(Debug, Parser)]
#[command(name = "attune", version, arg_required_else_help = true)]
#[command(after_help = "Examples:
  attune methods list                       what can be named in a job file
  attune validate job.yaml                  all faults of a job file at once
  attune data preview --job job.yaml        what the model will read, and what it will learn

Exit status: 0 done, 1 the job or call failed, 2 wrong usage or an invalid file.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Global {
    /// Writes JSON: one document, or one per line where a command streams.
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) server: crate::remote::Server,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Arguments),
    Up(up::Up),
    Submit(submit::Arguments),
    #[command(subcommand)]
    Jobs(jobs::Command),
    #[command(subcommand)]
    Artifacts(artifacts::Command),
    #[command(subcommand)]
    Workers(workers::Command),
    #[command(subcommand)]
    Projects(projects::Command),
    #[command(subcommand)]
    Methods(methods::Command),
    Validate(validate::Arguments),
    #[command(subcommand)]
    Data(data::Command),
    Generate(generate::Arguments),
    Classify(classify::Arguments),
    Embed(embed::Arguments),
    #[command(subcommand)]
    Experiment(experiment::Command),
    Fairness(fairness::Arguments),
    Answers(answers::Arguments),
    Drift(drift::Arguments),
    Merge(merge::Arguments),
    Convert(convert::Arguments),
    #[command(subcommand)]
    Tokens(tokens::Command),
    Audit(audit::Arguments),
    Scheduler(up::Scheduler),
    Worker(up::Worker),
    /// Shows versions, processor and memory: what a report of a problem needs.
    Doctor,
    Completions(completions::Arguments),
    /// Trains one attempt for a worker: a request on standard input, events on standard output.
    #[command(hide = true)]
    Attempt,
}

/// Runs what the command line asks for.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<(), Failure> {
    let server = &arguments.global.server;
    match arguments.command {
        Command::Up(arguments) => up::up(&arguments),
        Command::Scheduler(arguments) => up::scheduler(&arguments, server),
        Command::Worker(arguments) => up::worker(&arguments, server),
        Command::Submit(arguments) => submit::run(&arguments, server, out),
        Command::Jobs(command) => jobs::run(&command, server, out),
        Command::Artifacts(command) => artifacts::run(&command, server, out),
        Command::Workers(command) => workers::run(&command, server, out),
        Command::Projects(command) => projects::run(&command, server, out),
        Command::Demo(arguments) => demo::run(&arguments, out),
        Command::Methods(command) => methods::run(&command, out),
        Command::Validate(arguments) => validate::run(&arguments, out),
        Command::Data(command) => data::run(&command, out),
        Command::Generate(arguments) => generate::run(&arguments, server, out),
        Command::Classify(arguments) => classify::run(&arguments, server, out),
        Command::Embed(arguments) => embed::run(&arguments, server, out),
        Command::Experiment(command) => experiment::run(&command, server, out),
        Command::Fairness(arguments) => fairness::run(&arguments, server, out),
        Command::Answers(arguments) => answers::run(&arguments, server, out),
        Command::Drift(arguments) => drift::run(&arguments, server, out),
        Command::Merge(arguments) => merge::run(&arguments, server, out),
        Command::Convert(arguments) => convert::run(&arguments, server, out),
        Command::Tokens(command) => tokens::run(&command, server, out),
        Command::Audit(arguments) => audit::run(&arguments, server, out),
        Command::Doctor => doctor::run(out),
        Command::Completions(arguments) => completions::run(&arguments, out),
        Command::Attempt => attempt::run(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::Arguments;

    #[test]
    fn the_definitions_hold_together() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_command_says_what_it_does() {
        fn walk(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            assert!(command.get_about().is_some(), "{path} says nothing");
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{path}: {} says nothing", argument.get_id());
            }
            for inner in command.get_subcommands() {
                walk(inner, &path);
            }
        }
        let mut command = Arguments::command();
        command.build();
        walk(&command, "");
    }
}
