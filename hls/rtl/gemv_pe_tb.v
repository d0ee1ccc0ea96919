// Test bench: plays groups of commands from a file into the processing element and writes down what comes out.
//
//   vvp gemv_pe_tb.vvp +input=FILE +output=FILE          (parameters: -Pgemv_pe_tb.LANES=2, verilator: -GLANES=2)
//
// Input, per group: commands, words of x, beats of w, results; how often x, w and y are held up (of 256 cycles; w
// negative: evenly rather than at random); the cycle of a reset, after which the group starts over (0: none); then the
// commands (rows, blocks, exponent, load), the words and the beats in hexadecimal. tests/rtl_model.py writes it.
// Output, per group: its results in hexadecimal, and a line "cycles starved blocked drain" (see `finish`).
`timescale 1ns / 1ps
module gemv_pe_tb;
    parameter WEIGHT_BITS = 4;
    parameter LANES       = 4;
    parameter HAS_MIN     = 0;
    parameter USE_DSP     = 0;
    parameter MAX_BLOCKS  = 1024;
    parameter OUT_DEPTH   = 32;
    localparam MOST = 1 << 16;         // words or beats of one group

    reg clk = 0;
    always #1 clk = ~clk;

    reg rst = 1;
    reg command_valid = 0, x_valid = 0, w_valid = 0, y_ready = 0;
    wire command_ready, x_ready, w_ready, y_valid;
    reg [23:0] command_rows;
    reg [15:0] command_blocks;
    reg signed [8:0] command_exponent;
    reg command_load;
    reg [271:0] x_data;
    reg [511:0] w_data;
    wire [31:0] y_data;

    gemv_pe #(
        .WEIGHT_BITS(WEIGHT_BITS), .LANES(LANES), .HAS_MIN(HAS_MIN), .USE_DSP(USE_DSP), .MAX_BLOCKS(MAX_BLOCKS),
        .OUT_DEPTH(OUT_DEPTH)
    ) dut (
        .clk(clk), .rst(rst),
        .command_valid(command_valid), .command_ready(command_ready), .command_rows(command_rows),
        .command_blocks(command_blocks), .command_exponent(command_exponent), .command_load(command_load),
        .x_valid(x_valid), .x_ready(x_ready), .x_data(x_data),
        .w_valid(w_valid), .w_ready(w_ready), .w_data(w_data),
        .y_valid(y_valid), .y_ready(y_ready), .y_data(y_data)
    );

    reg [71:0] commands [0:1023];
    reg [271:0] xs [0:MOST-1];
    reg [511:0] ws [0:MOST-1];
    reg [31:0] ys [0:MOST-1];
    integer n_commands, n_x, n_w, n_y, hold_x, hold_w, hold_y, reset_at;

    // xorshift32 (Marsaglia, Xorshift RNGs, 2003), the same in every simulator.
    reg [31:0] random = 32'h9E3779B9;
    function [31:0] next_random(input [31:0] r);
        reg [31:0] a, b;
        begin
            a = r ^ (r << 13);
            b = a ^ (a >> 17);
            next_random = b ^ (b << 5);
        end
    endfunction

    reg running = 0;
    integer i_command, i_x, i_w, i_y, cycle, started, starved, blocked, written, last_write, credit_w;
    reg go_x, go_w, go_y;
    // Everything is sampled at the rising edge, as the design itself does it.
    always @(posedge clk) if (running) begin
        cycle <= cycle + 1;
        random <= next_random(random);
        go_x = random[7:0] >= hold_x;
        go_y = random[23:16] >= hold_y;
        if (hold_w >= 0) go_w = random[15:8] >= hold_w;
        else begin                     // evenly: 256 + hold_w beats in 256 cycles
            credit_w = credit_w + 256 + hold_w;
            go_w = credit_w >= 256;
        end

        if (command_valid && command_ready && started < 0) started <= cycle;
        if (!command_valid || command_ready) begin
            command_valid <= i_command < n_commands;
            {command_rows, command_blocks, command_exponent, command_load} <= commands[i_command];
            if (i_command < n_commands) i_command <= i_command + 1;
        end
        if (!x_valid || x_ready) begin
            x_valid <= go_x && i_x < n_x;
            x_data  <= go_x ? xs[i_x] : {17{16'hDEAD}};
            if (go_x && i_x < n_x) i_x <= i_x + 1;
        end
        if (!w_valid || w_ready) begin
            w_valid <= go_w && i_w < n_w;
            w_data  <= go_w ? ws[i_w] : {32{16'hDEAD}};
            if (go_w && i_w < n_w) begin
                i_w <= i_w + 1;
                if (hold_w < 0) credit_w = credit_w - 256;
            end
        end
        if (hold_w < 0 && credit_w > 256) credit_w = 256;     // what was not taken is lost, as in a memory
        y_ready <= go_y;
        if (y_valid && y_ready) begin
            ys[i_y] <= y_data;
            i_y <= i_y + 1;
        end

        // Why nothing moved: no data though it was wanted; no credit though there was data (gemv_pe.v).
        if (started >= 0) begin
            if ((x_ready && !x_valid) || (w_ready && !w_valid)) starved <= starved + 1;
            if (dut.state == 3 && dut.words_left == 0 && dut.credits == 0) blocked <= blocked + 1;
        end
        if (dut.done[6]) last_write <= cycle;
    end

    task start;
        begin
            i_command = 0; i_x = 0; i_w = 0; i_y = 0; cycle = 0; started = -1; starved = 0; blocked = 0; credit_w = 0;
            running = 1;
        end
    endtask

    task reset;
        begin
            @(negedge clk) rst = 1;
            running = 0;
            {command_valid, x_valid, w_valid, y_ready} = 0;
            repeat (2) @(negedge clk);
            rst = 0;
        end
    endtask

    reg [511:0] word;                  // $fscanf of Verilator 5.006 reads into a variable, not into an element of a memory
    integer in, out, i, got, rows, blocks, exponent, load;
    reg [1023:0] input_name, output_name;
    initial begin
        if (!$value$plusargs("input=%s", input_name) || !$value$plusargs("output=%s", output_name)) begin
            $display("usage: +input=FILE +output=FILE");
            $finish;
        end
        in = $fopen(input_name, "r");
        out = $fopen(output_name, "w");
        reset;
        got = $fscanf(in, "%d %d %d %d %d %d %d %d", n_commands, n_x, n_w, n_y, hold_x, hold_w, hold_y, reset_at);
        while (got == 8) begin
            for (i = 0; i < n_commands; i = i + 1) begin
                got = $fscanf(in, "%d %d %d %d", rows, blocks, exponent, load);
                commands[i] = {rows[23:0], blocks[15:0], exponent[8:0], load[0]};
            end
            for (i = 0; i < n_x; i = i + 1) begin
                got = $fscanf(in, "%h", word);
                xs[i] = word[271:0];
            end
            for (i = 0; i < n_w; i = i + 1) begin
                got = $fscanf(in, "%h", word);
                ws[i] = word;
            end
            @(negedge clk) start;
            if (reset_at > 0) begin
                wait (cycle >= reset_at);
                reset;
                start;
            end
            wait (i_y == n_y || cycle > 1000000);
            @(negedge clk);
            for (i = 0; i < i_y; i = i + 1) $fdisplay(out, "%h", ys[i]);
            // cycles: from the first command to the last result. drain: how long the last result lay in the FIFO.
            $fdisplay(out, "cycles %0d %0d %0d %0d", cycle - started, starved, blocked, cycle - 2 - last_write);
            repeat (4) @(negedge clk);
            if (y_valid || i_w != n_w || i_x != n_x || !command_ready) $fdisplay(out, "left over");
            running = 0;
            {command_valid, x_valid, w_valid, y_ready} = 0;
            got = $fscanf(in, "%d %d %d %d %d %d %d %d", n_commands, n_x, n_w, n_y, hold_x, hold_w, hold_y, reset_at);
        end
        $fclose(out);
        $finish;
    end
endmodule
