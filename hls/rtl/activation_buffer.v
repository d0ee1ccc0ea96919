// The activations of one row of x, on chip: per block of 32, 32 int8, the float16 step they count in, and their sum.
//
// Written block by block, read LANES blocks per cycle: one memory per lane, 285 bits wide (four 72-bit block RAMs),
// block b in lane b % LANES. The sum is made on the way in, so that a minimum costs one product per block.
// Reading takes 2 cycles (the second is the block RAM's output register); a write is in the memory 6 cycles later.
module activation_buffer #(
    parameter LANES      = 4,          // a power of two
    parameter MAX_BLOCKS = 1024
) (
    input  wire                              clk,
    input  wire                              write,
    input  wire [15:0]                       write_block,
    input  wire [271:0]                      write_data,   // {step, 32 activations}
    input  wire [15:0]                       read_word,    // block / LANES
    output wire [285 * LANES-1:0]            read_data     // per lane {sum, step, 32 activations}
);
    localparam LOG_LANES = $clog2(LANES);
    localparam WORDS = MAX_BLOCKS / LANES;
    localparam A = $clog2(WORDS);

    wire [271:0] data;
    wire [15:0] block;
    wire enable;
    wire signed [12:0] sum;
    adder_tree #(.LEVELS(5), .WIDTH(8)) add (.clk(clk), .terms(write_data[255:0]), .sum(sum));
    delay #(.WIDTH(289), .CYCLES(5)) wait_for_sum (
        .clk(clk), .d({write, write_block, write_data}), .q({enable, block, data})
    );
    genvar lane;
    generate
        for (lane = 0; lane < LANES; lane = lane + 1) begin : bank
            wire mine = LANES == 1 || block[LOG_LANES > 0 ? LOG_LANES - 1 : 0:0] == lane;
            (* ram_style = "block" *) reg [284:0] memory [0:WORDS-1];
            reg [284:0] word, word_q;
            integer i;
            initial for (i = 0; i < WORDS; i = i + 1) memory[i] = 0;   // as the FPGA's configuration leaves it
            always @(posedge clk) begin
                if (enable && mine) memory[block[LOG_LANES +: A]] <= {sum, data};
                word   <= memory[read_word[A-1:0]];
                word_q <= word;
            end
            assign read_data[285 * lane +: 285] = word_q;
        end
    endgenerate
endmodule
